// The CUDA kernels of `decode` and its gradient against METHOD section 4 in double. Skipped without a GPU.
#include <memory>

#include "cuda_case.h"

using namespace aniso;
using namespace aniso_test;

namespace {

struct DecodeShape {
  int64_t rows;
  int32_t width;
  int32_t rank;
  bool project;
  bool shifted;
};

template <typename S>
class Suite {
 public:
  using T = typename Working<S>::type;

  Suite(const DecodeShape& shape, bool spread, Products products, Random& random)
      : shape_(shape),
        products_(products),
        name_(std::string(Format<S>::kName) + (products == Products::split ? " split" : " ieee") +
              " N=" + std::to_string(shape.rows) + " D=" + std::to_string(shape.width) +
              " R=" + std::to_string(shape.rank) + (shape.project ? " projected" : "") +
              (shape.shifted ? " calibrated" : "") + (spread ? " spread" : "")),
        basis_(random_values<T>(int64_t(shape.width) * shape.rank, -0.3, 0.3, random)),
        shift_(random_values<T>(shape.width, -0.3 / std::sqrt(shape.width), 0.3 / std::sqrt(shape.width), random)),
        basis_copy_(basis_),
        shift_copy_(shift_),
        state_(shape.rows, int32_t(state_columns()), spread, -1, 1, random),
        deltas_(shape.rows, int32_t(delta_columns()), spread, -3, 3, random),
        grad_(shape.rows, shape.width, spread, -1, 1, random) {}

  void run() const {
    const std::vector<S> out = decode();
    const auto [grad_state, grad_deltas] = decode_backward();
    for (int64_t i = 0; i < shape_.rows; ++i) {
      check_row(i, out.data() + i * shape_.width, grad_state.data() + i * state_columns(),
                grad_deltas.data() + i * delta_columns());
    }
  }

 private:
  int64_t state_columns() const { return shape_.rank / 2 * 3 + shape_.width; }
  int64_t delta_columns() const { return shape_.rank + shape_.width; }
  double basis(int64_t j, int64_t r) const { return double(basis_[size_t(j * shape_.rank + r)]); }
  DeviceUpdate<T> update() const {
    return {shape_.width, shape_.rank, T(0.7), T(0.4), T(0.3), shape_.project,
            basis_copy_.data(), shape_.shifted ? shift_copy_.data() : nullptr};
  }
  using Rows = typename SpreadRows<S>::Copy;

  std::vector<S> decode() const {
    const Rows state(state_), deltas(deltas_);
    int64_t bytes = 0;
    CHECK_CUDA(rows_workspace<S>(shape_.rows, shape_.width, &bytes));
    const DeviceWorkspace workspace(bytes);
    DeviceResult<S> out(shape_.rows * shape_.width);
    CHECK_CUDA((launch_decode(update(), state.rows, deltas.rows, out.data(), products_, workspace.get(), nullptr)));
    return out.fetch("decode " + name_);
  }

  std::pair<std::vector<S>, std::vector<S>> decode_backward() const {
    const Rows state(state_), deltas(deltas_), grad(grad_);
    int64_t bytes = 0;
    CHECK_CUDA(rows_workspace<S>(shape_.rows, 2 * shape_.width, &bytes));
    const DeviceWorkspace workspace(bytes);
    DeviceResult<S> grad_state(shape_.rows * state_columns()), grad_deltas(shape_.rows * delta_columns());
    CHECK_CUDA((launch_decode_backward(update(), grad.rows, state.rows, deltas.rows, grad_state.data(),
                                       grad_deltas.data(), products_, workspace.get(), nullptr)));
    return {grad_state.fetch("decode_backward state " + name_), grad_deltas.fetch("decode_backward deltas " + name_)};
  }

  // Q^T v and Q k
  std::vector<double> projected(const std::vector<double>& v) const {
    std::vector<double> result(size_t(shape_.rank));
    for (int32_t j = 0; j < shape_.width; ++j) {
      for (int32_t r = 0; r < shape_.rank; ++r) result[size_t(r)] += basis(j, r) * v[size_t(j)];
    }
    return result;
  }
  std::vector<double> rebuilt(const std::vector<double>& k) const {
    std::vector<double> result(size_t(shape_.width));
    for (int32_t j = 0; j < shape_.width; ++j) {
      for (int32_t r = 0; r < shape_.rank; ++r) result[size_t(j)] += basis(j, r) * k[size_t(r)];
    }
    return result;
  }

  void check_row(int64_t i, const S* out, const S* grad_state, const S* grad_deltas) const {
    const int32_t blocks = shape_.rank / 2;
    const auto in = update();
    const double a_theta = double(in.a_theta), a_rho = double(in.a_rho), a_v = double(in.a_v);
    std::vector<double> step, tanh_move, w, terms, shift, grad, k(size_t(shape_.rank));
    for (int32_t j = 0; j < shape_.width; ++j) {
      tanh_move.push_back(std::tanh(deltas_(i, shape_.rank + j)));
      step.push_back(a_v * tanh_move.back());
      grad.push_back(grad_(i, j));
      if (shape_.shifted) shift.push_back(double(shift_[size_t(j)]));
    }
    const std::vector<double> leak = projected(step);
    for (int32_t block = 0; block < blocks; ++block) {
      const double angle = a_theta * std::tanh(deltas_(i, block));
      const double radius = std::exp(state_(i, 2 * blocks + block) + a_rho * std::tanh(deltas_(i, blocks + block)));
      const double sin0 = state_(i, block), cos0 = state_(i, blocks + block);
      const size_t at = size_t(2 * block);
      k[at] = radius * (cos0 * std::cos(angle) - sin0 * std::sin(angle)) - (shape_.project ? leak[at] : 0);
      k[at + 1] = radius * (sin0 * std::cos(angle) + cos0 * std::sin(angle)) - (shape_.project ? leak[at + 1] : 0);
    }
    const std::vector<double> base = rebuilt(k);
    for (int32_t j = 0; j < shape_.width; ++j) {
      const double v0 = state_(i, 3 * blocks + j);
      w.push_back(base[size_t(j)] + v0 + step[size_t(j)]);
      double absolute = std::fabs(v0) + std::fabs(step[size_t(j)]);
      for (int32_t r = 0; r < shape_.rank; ++r) {
        absolute += std::fabs(basis(j, r)) * (std::fabs(k[size_t(r)]) + 4) * (shape_.rank + shape_.width);
      }
      terms.push_back(absolute);
    }
    const NormaliseOracle normalised(w, terms, shift);
    for (int32_t j = 0; j < shape_.width; ++j) {
      CHECK_EXPECTED(out[j], normalised.row(size_t(j)), product_roundings<S>(products_), name_, i, j);
    }

    std::vector<double> grad_w, state_expected, delta_expected;
    state_expected.resize(size_t(state_columns()));
    delta_expected.resize(size_t(delta_columns()));
    for (const Expected& e : normalised.backward(grad)) grad_w.push_back(e.value);
    const std::vector<double> grad_c = projected(grad_w), back = rebuilt(grad_c);
    for (int32_t block = 0; block < blocks; ++block) {
      const double tanh_theta = std::tanh(deltas_(i, block)), tanh_rho = std::tanh(deltas_(i, blocks + block));
      const double angle = a_theta * tanh_theta, sin0 = state_(i, block), cos0 = state_(i, blocks + block);
      const double radius = std::exp(state_(i, 2 * blocks + block) + a_rho * tanh_rho);
      const double a = grad_c[size_t(2 * block)], b = grad_c[size_t(2 * block + 1)];
      const double cos = cos0 * std::cos(angle) - sin0 * std::sin(angle);
      const double sin = sin0 * std::cos(angle) + cos0 * std::sin(angle);
      const size_t at = size_t(block), count = size_t(blocks);
      state_expected[at] = radius * (b * std::cos(angle) - a * std::sin(angle));
      state_expected[count + at] = radius * (a * std::cos(angle) + b * std::sin(angle));
      state_expected[2 * count + at] = radius * (a * cos + b * sin);
      delta_expected[at] = a_theta * (1 - tanh_theta * tanh_theta) * radius * (b * cos - a * sin);
      delta_expected[count + at] = a_rho * (1 - tanh_rho * tanh_rho) * state_expected[2 * count + at];
    }
    for (size_t j = 0; j < grad_w.size(); ++j) {
      state_expected[size_t(3 * blocks) + j] = grad_w[j];
      const double kept = grad_w[j] - (shape_.project ? back[j] : 0);
      delta_expected[size_t(shape_.rank) + j] = a_v * (1 - tanh_move[j] * tanh_move[j]) * kept;
    }
    const double tolerance = gradient_tolerance<S>(products_);
    check_row_norm(grad_state, state_expected, tolerance, "decode_backward state " + name_, i);
    check_row_norm(grad_deltas, delta_expected, tolerance, "decode_backward deltas " + name_, i);
  }

  DecodeShape shape_;
  Products products_;
  std::string name_;
  std::vector<T> basis_, shift_;
  OnDevice<T> basis_copy_, shift_copy_;
  SpreadRows<S> state_, deltas_, grad_;
};

template <typename S>
void test_format(Products products) {
  Random random(43);
  for (const bool project : {false, true}) {
    for (const bool shifted : {false, true}) {
      Suite<S>({0, 8, 4, project, shifted}, false, products, random).run();
      Suite<S>({1, 2, 2, project, shifted}, false, products, random).run();
      Suite<S>({33, 7, 6, project, shifted}, true, products, random).run();
      Suite<S>({70, 64, 18, project, shifted}, false, products, random).run();
      if (small_sizes()) continue;
      Suite<S>({129, 130, 130, project, shifted}, false, products, random).run();
      Suite<S>({70, 200, 66, project, shifted}, true, products, random).run();
    }
  }
  if (small_sizes()) return;
  Suite<S>({40000, 8, 4, true, true}, false, products, random).run();
  Suite<S>({21, 1026, 1024, true, true}, false, products, random).run();
}

}  // namespace

void aniso_test::run_tests() {
  skip_without_device();
  test_format<double>(Products::ieee);
  test_format<float>(Products::ieee);
  test_format<float>(Products::split);
  test_format<Float16>(Products::ieee);
  test_format<BFloat16>(Products::ieee);
}
