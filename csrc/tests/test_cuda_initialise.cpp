// The CUDA kernels of `correct`, its sums, `encode` and their gradients against METHOD section 4 in double, through both
// matrix products. Skipped without a GPU.
#include <algorithm>
#include <memory>

#include "cuda_case.h"

using namespace aniso;
using namespace aniso_test;

namespace {

template <typename S>
class Suite {
 public:
  using T = typename Working<S>::type;

  Suite(const Shape& shape, bool spread, Products products, Random& random)
      : case_(shape, random),
        shape_(shape),
        products_(products),
        name_(std::string(Format<S>::kName) + (products == Products::split ? " split " : " ieee ") + shape.text() +
              (spread ? " spread" : "")),
        y_(shape.rows, shape.width, spread, -0.3, 0.3, random),
        grad_(shape.rows, shape.width, spread, -1, 1, random),
        state_grad_(shape.rows, int32_t(state_columns()), spread, -1, 1, random) {}

  void run() {
    const std::vector<S> corrected = correct(), encoded = encode();
    const std::vector<S> correct_gradient = correct_backward(), encode_gradient = encode_backward();
    const std::vector<double> sums = correct_sums();
    std::vector<double> expected_sums(size_t(shape_.width)), sum_terms(expected_sums.size());
    for (int64_t i = 0; i < shape_.rows; ++i) {
      const auto y = [&](int64_t j) { return y_(i, j); };
      const std::vector<BlockOracle> blocks = case_.blocks(y);
      const std::vector<Expected> w = case_.rebuilt(blocks, y, true);
      check_correct(i, w, corrected.data() + i * shape_.width);
      check_encode(i, blocks, case_.rebuilt(blocks, y, false), encoded.data() + i * state_columns());
      bool near_knot = false;  // there the slope is either of two
      for (const BlockOracle& block : blocks) near_knot = near_knot || block.near_knot();
      if (!near_knot) {
        check_correct_backward(i, blocks, w, correct_gradient.data() + i * shape_.width);
        check_encode_backward(i, blocks, encode_gradient.data() + i * shape_.width);
      }
      const NormaliseOracle unit = case_.normalised(w, false);
      for (int32_t j = 0; j < shape_.width; ++j) {
        expected_sums[size_t(j)] += unit.row(size_t(j)).value;
        sum_terms[size_t(j)] += unit.row(size_t(j)).terms;
      }
    }
    for (int32_t j = 0; j < shape_.width; ++j) {
      const double allowed = product_roundings<S>(products_) * epsilon<T>() * sum_terms[size_t(j)];
      CHECK(std::fabs(sums[size_t(j)] - expected_sums[size_t(j)]) <= allowed + 1e-14, "sums %s column %d: %.9g, expected %.9g",
            name_.c_str(), int(j), sums[size_t(j)], expected_sums[size_t(j)]);
    }
    check_repeated(sums);
    check_poison(corrected);
  }

 private:
  int64_t state_columns() const { return shape_.rank / 2 * 3 + shape_.width; }
  using Rows = typename SpreadRows<S>::Copy;

  DeviceWorkspace rows_workspace() const {
    int64_t bytes = 0;
    CHECK_CUDA(aniso::rows_workspace<S>(shape_.rows, shape_.width, &bytes));
    return DeviceWorkspace(bytes);
  }

  std::vector<S> correct() const {
    const Rows y(y_);
    const DeviceWorkspace workspace = rows_workspace();
    DeviceResult<S> out(shape_.rows * shape_.width);
    CHECK_CUDA((launch_correct(case_.operands(), y.rows, out.data(), products_, workspace.get(), nullptr)));
    return out.fetch("correct " + name_);
  }

  std::vector<double> correct_sums() const {
    const Rows y(y_);
    int64_t bytes = 0;
    CHECK_CUDA(sums_workspace<S>(shape_.rows, shape_.width, &bytes));
    const DeviceWorkspace workspace(bytes);
    DeviceResult<double> sums(shape_.width);
    CHECK_CUDA((launch_correct_sums(case_.operands(), y.rows, sums.data(), products_, workspace.get(), nullptr)));
    return sums.fetch("sums " + name_);
  }

  std::vector<S> correct_backward() const {
    const Rows y(y_), grad(grad_);
    const DeviceWorkspace workspace = rows_workspace();
    DeviceResult<S> out(shape_.rows * shape_.width);
    CHECK_CUDA((launch_correct_backward(case_.operands(), grad.rows, y.rows, out.data(), products_, workspace.get(), nullptr)));
    return out.fetch("correct_backward " + name_);
  }

  std::vector<S> encode() const {
    const Rows y(y_);
    const DeviceWorkspace workspace = rows_workspace();
    DeviceResult<S> out(shape_.rows * state_columns());
    CHECK_CUDA((launch_encode(case_.operands(), y.rows, out.data(), products_, workspace.get(), nullptr)));
    return out.fetch("encode " + name_);
  }

  std::vector<S> encode_backward() const {
    const Rows y(y_), grad(state_grad_);
    DeviceResult<S> out(shape_.rows * shape_.width);
    CHECK_CUDA((launch_encode_backward(case_.operands(), grad.rows, y.rows, out.data(), products_, nullptr)));
    return out.fetch("encode_backward " + name_);
  }

  void check_correct(int64_t i, const std::vector<Expected>& w, const S* got) const {
    const NormaliseOracle normalised = case_.normalised(w, true);
    for (int32_t j = 0; j < shape_.width; ++j) {
      CHECK_EXPECTED(got[j], normalised.row(size_t(j)), product_roundings<S>(products_), name_, i, j);
    }
  }

  void check_encode(int64_t i, const std::vector<BlockOracle>& blocks, const std::vector<Expected>& v0, const S* got) const {
    const double roundings = product_roundings<S>(products_);
    const int32_t count = shape_.rank / 2;
    for (int32_t block = 0; block < count; ++block) {
      const BlockOracle& b = blocks[size_t(block)];
      CHECK_EXPECTED(got[block], b.sine(), roundings, name_, i, block);
      CHECK_EXPECTED(got[count + block], b.cosine(), roundings, name_, i, count + block);
      CHECK_EXPECTED(got[2 * count + block], b.log_radius(), roundings, name_, i, 2 * count + block);
    }
    for (int32_t j = 0; j < shape_.width; ++j) {
      CHECK_EXPECTED(got[3 * count + j], v0[size_t(j)], roundings, name_, i, 3 * count + j);
    }
  }

  // grad_y = W_in^T grad_p + scale * grad_w, with grad_k = W_out^T grad_w; through(block, a, b, c): the block's map.
  template <typename Through>
  std::vector<double> gradient(const std::vector<double>& grad_w, const Through& through) const {
    const size_t rank = size_t(shape_.rank);
    std::vector<double> grad_k(size_t(shape_.rank_out())), grad_p(size_t(shape_.rank_in())), grad_y;
    for (int32_t r = 0; r < shape_.rank_out(); ++r) {
      for (int32_t j = 0; j < shape_.width; ++j) grad_k[size_t(r)] += case_.output_weight(j, r) * grad_w[size_t(j)];
    }
    for (size_t r = 0; r < rank; ++r) {
      const size_t pair = r / 2 * 2;
      const double own = shape_.complement == Complement::scalar ? -case_.scale(0) * grad_k[r] : grad_k[rank + r];
      grad_p[r] = through(int32_t(r / 2), grad_k[pair], grad_k[pair + 1], int32_t(r % 2)) + own;
      if (shape_.complement == Complement::projected) grad_p[rank + r] = -grad_k[r];
    }
    for (int32_t j = 0; j < shape_.width; ++j) {
      double sum = case_.scale(j) * grad_w[size_t(j)];
      for (int32_t r = 0; r < shape_.rank_in(); ++r) sum += case_.input_weight(r, j) * grad_p[size_t(r)];
      grad_y.push_back(sum);
    }
    return grad_y;
  }

  static double largest_turn(const std::vector<BlockOracle>& blocks) {
    double largest = 0;
    for (const BlockOracle& block : blocks) largest = std::max(largest, block.turn());
    return largest;
  }

  void check_correct_backward(int64_t i, const std::vector<BlockOracle>& blocks, const std::vector<Expected>& w,
                              const S* got) const {
    std::vector<double> grad, grad_w;
    for (int32_t j = 0; j < shape_.width; ++j) grad.push_back(grad_(i, j));
    for (const Expected& e : case_.normalised(w, true).backward(grad)) grad_w.push_back(e.value);
    const std::vector<double> expected = gradient(grad_w, [&](int32_t block, double a, double b, int32_t c) {
      return blocks[size_t(block)].map_gradient(a, b, c).value;
    });
    check_row_norm(got, expected, gradient_tolerance<S>(products_, largest_turn(blocks)), "correct_backward " + name_, i);
  }

  void check_encode_backward(int64_t i, const std::vector<BlockOracle>& blocks, const S* got) const {
    const int32_t count = shape_.rank / 2;
    std::vector<double> grad_v0;
    for (int32_t j = 0; j < shape_.width; ++j) grad_v0.push_back(state_grad_(i, 3 * count + j));
    const std::vector<double> expected = gradient(grad_v0, [&](int32_t block, double, double, int32_t c) {
      const double sin = state_grad_(i, block), cos = state_grad_(i, count + block);
      return blocks[size_t(block)].polar_gradient(sin, cos, state_grad_(i, 2 * count + block), c).value;
    });
    check_row_norm(got, expected, gradient_tolerance<S>(products_, largest_turn(blocks)), "encode_backward " + name_, i);
  }

  void check_repeated(const std::vector<double>& sums) const {
    const std::vector<double> again = correct_sums();
    CHECK(std::memcmp(sums.data(), again.data(), sums.size() * sizeof(double)) == 0, "sums %s: not repeatable",
          name_.c_str());
  }

  // A NaN stays in its row.
  void check_poison(const std::vector<S>& clean) {
    if (shape_.rows < 2) return;
    const int64_t poisoned = shape_.rows / 2;
    y_.set(poisoned, 0, NAN);
    const std::vector<S> other = correct();
    for (int64_t i = 0; i < shape_.rows * shape_.width; ++i) {
      const bool same = std::memcmp(&clean[size_t(i)], &other[size_t(i)], sizeof(S)) == 0;
      CHECK(i / shape_.width == poisoned ? std::isnan(exact(other[size_t(i)])) : same,
            "%s: a NaN in row %d, now row %d is %g", name_.c_str(), int(poisoned), int(i / shape_.width),
            exact(other[size_t(i)]));
    }
  }

  InitialiseCase<T> case_;
  Shape shape_;
  Products products_;
  std::string name_;
  SpreadRows<S> y_, grad_, state_grad_;
};

template <typename S>
void test_format(Products products) {
  Random random(41);
  for (const Complement complement : {Complement::scalar, Complement::diagonal, Complement::projected}) {
    for (const bool shifted : {false, true}) {
      Suite<S>({0, 8, 4, 16, 8, complement, shifted}, false, products, random).run();
      Suite<S>({1, 2, 2, 2, 1, complement, shifted}, false, products, random).run();
      Suite<S>({33, 7, 6, 3, 8, complement, shifted}, true, products, random).run();
      Suite<S>({70, 64, 18, 9, 32, complement, shifted}, false, products, random).run();
      if (small_sizes()) continue;
      Suite<S>({70, 130, 66, 200, 1024, complement, shifted}, false, products, random).run();
      Suite<S>({129, 200, 136, 64, 16, complement, shifted}, true, products, random).run();
    }
  }
  if (small_sizes()) return;
  // More rows than a grid of tiles, and coefficients of a whole tile too many for a block's shared memory.
  Suite<S>({40000, 8, 4, 16, 8, Complement::scalar, true}, false, products, random).run();
  // In double the gradients of a projected complement at this rank fit no block; ranks to 1024 are for narrower formats.
  const int32_t rank = std::is_same_v<S, double> ? 512 : 1024;
  Suite<S>({21, 1026, rank, 4, 4, Complement::projected, true}, false, products, random).run();
}

void test_refusals() {
  const DeviceOperands<float> nothing{};
  const DeviceRows<float> rows{nullptr, 0, 1, 1};
  CHECK((launch_correct<float, float>(nothing, rows, nullptr, Products::ieee, {}, nullptr)) == cudaErrorInvalidValue,
        "empty operands must be refused");
  Random random(1);
  const InitialiseCase<float> small({4, 8, 4, 16, 8, Complement::scalar, false}, random);
  const SpreadRows<BFloat16> y(4, 8, false, -1, 1, random);
  const SpreadRows<BFloat16>::Copy copy(y);
  DeviceResult<BFloat16> out(32);
  CHECK((launch_correct<BFloat16, float>(small.operands(), copy.rows, out.data(), Products::ieee, {}, nullptr)) ==
            cudaErrorInvalidValue,
        "a missing workspace must be refused");
}

}  // namespace

void aniso_test::run_tests() {
  skip_without_device();
  test_refusals();
  test_format<double>(Products::ieee);
  test_format<float>(Products::ieee);
  test_format<float>(Products::split);
  test_format<Float16>(Products::ieee);
  test_format<BFloat16>(Products::ieee);
}
