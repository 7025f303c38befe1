// The gradients on Hopper against those of METHOD section 4 in double, for the rounded basis and the table that the kernels have.
// Skipped where no GPU of compute capability 9.0 is visible.
#include <algorithm>

#include "sm90_case.h"

using namespace aniso;
using namespace aniso_test;

namespace {

// What sums of D products in fp32 leave of a coordinate or of a dot product of rows of length one.
constexpr double kSumError = 3e-5;

struct Gradient {
  std::vector<double> row;  // [D]
  double allowed = 0;       // distance from it
};

double length_of(const std::vector<double>& values) {
  double squares = 0;
  for (const double value : values) squares += value * value;
  return std::sqrt(squares);
}

template <typename S>
class Suite : Sm90Case<S> {
 public:
  using Base = Sm90Case<S>;
  Suite(const Sm90Size& size, Random& random)
      : Base(size, random),
        grad_state_(random_values<S>(size.rows * (this->state_columns() + size.padding), -1.0, 1.0, random)),
        grad_(random_values<S>(size.rows * this->stride(), -1.0, 1.0, random)) {}

  void run_correct() {
    const typename Base::Device device(*this);
    const OnDevice<S> grad(grad_);
    const Sm90Rows<S> grads{grad.data(), this->size().rows, this->stride()};
    run("correct", [&](S* out) { return sm90_correct_backward(device.operands(), grads, device.rows(), out, nullptr); },
        [&](int64_t i) { return correct_gradient(i); });
  }

  void run_encode() {
    const typename Base::Device device(*this);
    const OnDevice<S> grad(grad_state_);
    const Sm90Rows<S> grads{grad.data(), this->size().rows, this->state_columns() + this->size().padding};
    run("encode", [&](S* out) { return sm90_encode_backward(device.operands(), grads, device.rows(), out, nullptr); },
        [&](int64_t i) { return encode_gradient(i); });
  }

 private:
  // A block of a row: its polar form, its map, and how far a slope may be from that of a neighbouring cell.
  struct Block {
    double length, rho, cos, sin;
    Mapped<double> mapped;
    double slope_error;
  };

  double grad_state(int64_t i, int64_t j) const {
    return exact(grad_state_[size_t(i * (this->state_columns() + this->size().padding) + j)]);
  }

  Block block_of(const std::vector<double>& c_t, int32_t block) const {
    const double a = c_t[2 * size_t(block)] + this->target(2 * block), b = c_t[2 * size_t(block) + 1] + this->target(2 * block + 1);
    const double length = std::hypot(a, b), rho = std::hypot(length, 1e-6);
    const Mapped<double> mapped = this->map(block, rho);
    double slope_error = 0;
    for (const double off : {-kSumError, kSumError}) {
      slope_error = std::max(slope_error, std::fabs(this->map(block, std::max(rho + off, 0.0)).slope - mapped.slope));
    }
    return {length, rho, a / length, b / length, mapped, slope_error};
  }

  // S x + Q k.
  template <typename Row>
  std::vector<double> rebuilt(const Row& x, const std::vector<double>& k) const {
    std::vector<double> row;
    for (int32_t j = 0; j < this->size().width; ++j) {
      double sum = this->scale(0) * x(j);
      for (int32_t r = 0; r < this->size().rank; ++r) sum += this->basis(j, r) * k[size_t(r)];
      row.push_back(sum);
    }
    return row;
  }

  Gradient encode_gradient(int64_t i) const {
    const int32_t blocks = this->blocks();
    const auto complement = [&](int64_t j) { return grad_state(i, 3 * blocks + j); };
    const std::vector<double> c_t = this->coordinates(i), back = this->projected(complement);
    std::vector<double> k(c_t.size());
    double squares = 0, from_sums = 0;
    for (int32_t block = 0; block < blocks; ++block) {
      const size_t at = 2 * size_t(block);
      const Block of = block_of(c_t, block);
      const double sin = grad_state(i, block), cos = grad_state(i, blocks + block), log = grad_state(i, 2 * blocks + block);
      const double relative = of.mapped.slope / of.mapped.radius;
      const double along = log * relative * of.length / of.rho, across = (sin * of.cos - cos * of.sin) / of.length;
      k[at] = of.cos * along - of.sin * across - this->scale(0) * back[at];
      k[at + 1] = of.sin * along + of.cos * across - this->scale(0) * back[at + 1];
      // What a coordinate that is off by kSumError changes: the direction, the radius and the cell.
      const double phase = (std::fabs(sin) + std::fabs(cos)) / of.length;
      const double changed = kSumError * (2 * phase + std::fabs(log) * relative) / of.length +
                             std::fabs(log) * (kSumError * relative * relative + of.slope_error / of.mapped.radius);
      from_sums += changed * changed;
    }
    Gradient gradient{rebuilt(complement, k), 0};
    for (int32_t j = 0; j < this->size().width; ++j) squares += complement(j) * complement(j);
    // Rounded are the result, its coefficients, and parts of Q^T g from three other blocks.
    const double rounded = length_of(gradient.row) + length_of(k) + this->scale(0) * std::sqrt(3 * squares);
    gradient.allowed = 1.01 * Format<S>::kHalfUlp * rounded + 1.01 * std::sqrt(from_sums) + kSumError * std::sqrt(squares);
    return gradient;
  }

  Gradient correct_gradient(int64_t i) const {
    const int32_t width = this->size().width;
    const auto grad = [&](int64_t j) { return exact(grad_[size_t(i * this->stride() + j)]); };
    const std::vector<double> c_t = this->coordinates(i);
    std::vector<Block> of;
    std::vector<double> k(c_t.size());
    double scale = this->scale(0), gain = 0;
    for (int32_t block = 0; block < this->blocks(); ++block) {
      of.push_back(block_of(c_t, block));
      const auto& [length, rho, cos, sin, mapped, slope_error] = of.back();
      const size_t at = 2 * size_t(block);
      k[at] = mapped.radius * cos - scale * c_t[at];
      k[at + 1] = mapped.radius * sin - scale * c_t[at + 1];
      gain = std::max({gain, std::fabs(mapped.slope), mapped.radius / length});
    }
    gain += scale;
    // The row, its norms, and the gradient at it, a product by a Jacobian at a time.
    std::vector<double> w = rebuilt([&](int32_t j) { return this->y(i, j); }, k), grad_w;
    for (int32_t j = 0; j < width; ++j) w[size_t(j)] += this->offset(j);
    const double norm = length_of(w);
    std::vector<double> h;
    double shift_length = 0, grad_length = 0, along = 0, radial = 0;
    for (int32_t j = 0; j < width; ++j) {
      h.push_back(w[size_t(j)] / norm + this->shift(j));
      shift_length += this->shift(j) * this->shift(j);
      grad_length += grad(j) * grad(j);
    }
    shift_length = std::sqrt(shift_length), grad_length = std::sqrt(grad_length);
    const double outer = 1 / length_of(h);
    for (int32_t j = 0; j < width; ++j) radial += grad(j) * h[size_t(j)] * outer;
    for (int32_t j = 0; j < width; ++j) grad_w.push_back((grad(j) - radial * h[size_t(j)] * outer) * outer);
    for (int32_t j = 0; j < width; ++j) along += grad_w[size_t(j)] * w[size_t(j)] / norm;
    for (int32_t j = 0; j < width; ++j) grad_w[size_t(j)] = (grad_w[size_t(j)] - along * w[size_t(j)] / norm) / norm;

    const std::vector<double> back = this->projected([&](int32_t j) { return grad_w[size_t(j)]; });
    std::vector<double> d(k.size()), spread(k.size(), 0.0);
    double from_sums = 0;
    for (size_t block = 0; block < of.size(); ++block) {
      const auto& [length, rho, cos, sin, mapped, slope_error] = of[block];
      const double a = back[2 * block], b = back[2 * block + 1];
      const double forward = (a * cos + b * sin) * mapped.slope * length / rho, across = (b * cos - a * sin) * mapped.radius / length;
      d[2 * block] = cos * forward - sin * across - scale * a;
      d[2 * block + 1] = sin * forward + cos * across - scale * b;
      // What a coordinate that is off by kSumError changes: the direction, the radius and the cell.
      const double changed = slope_error + kSumError * (3 * mapped.slope + 2 * mapped.radius / length) / length;
      from_sums += (a * a + b * b) * changed * changed;
    }
    Gradient gradient{rebuilt([&](int32_t j) { return grad_w[size_t(j)]; }, d), 0};

    // How far Q^T Q k is from k, for the norms and products that take it for that.
    const std::vector<double> without_rows = rebuilt([](int32_t) { return 0.0; }, k);
    const std::vector<double> again = this->projected([&](int32_t j) { return without_rows[size_t(j)]; });
    for (size_t r = 0; r < k.size(); ++r) spread[r] = again[r] - k[r];
    const double skew = length_of(spread), most = outer * grad_length / norm;  // |alpha t|
    const double row_squares = std::max(1.0, 1 + shift_length) * outer * outer;
    // By how much of |alpha t| a relative error of the norms or of w.t, which is at most |w| |t|, changes the gradient at w.
    const double reaction = 3 * (1 + row_squares * (2 + shift_length));
    const double dots = (length_of(k) / norm) * std::sqrt(3.0) * Format<S>::kHalfUlp + skew / norm * length_of(k) / norm + kSumError / norm;
    const double of_grad_w = most * (std::sqrt(3.0) * Format<S>::kHalfUlp + reaction * dots + skew / norm + kSumError);
    // Rounded are the result, its coefficients (with S beta k, as long as S |alpha t| |k|/|w|), and parts of h from three other blocks.
    const double rounded = length_of(gradient.row) + length_of(d) + scale * reaction * most * length_of(k) / norm;
    gradient.allowed = 1.01 * Format<S>::kHalfUlp * rounded + gain * of_grad_w + 1.01 * std::sqrt(from_sums);
    return gradient;
  }

  template <typename Launch, typename Expected>
  void run(const std::string& what, const Launch& launch, const Expected& expected) const {
    const Sm90Size& size = this->size();
    const std::string name = "gradient of " + what + " " + this->name();
    const auto result = [&] {
      AlignedResult<S> out(size.rows * size.width);
      CHECK_CUDA(launch(out.data()));
      return out.fetch(name);
    };
    const std::vector<S> found = result(), repeated = result();
    CHECK(std::memcmp(found.data(), repeated.data(), found.size() * sizeof(S)) == 0, "%s: not repeatable", name.c_str());
    for (int64_t i = 0; i < size.rows; ++i) {
      const Gradient gradient = expected(i);
      this->check_distance(&found[size_t(i * size.width)], gradient.row, gradient.allowed, ("gradient of " + what).c_str(), i);
    }
  }

  std::vector<S> grad_state_, grad_;
};

template <typename S>
void test_correct() {
  Random random(61);
  const auto run = [&](const Sm90Size& size) { Suite<S>(size, random).run_correct(); };
  run({1, 64, 2, false, false, 0});
  run({65, 200, 18, false, true, 8});
  run({70, 512, 128, false, true, 0});
  // More tiles than a grid holds, so that every barrier goes through several phases.
  run({small_sizes() ? 9000 : 40000, 64, 16, false, true, 0});
  if (small_sizes()) return;
  run({64, 520, 64, false, false, 16});
  run({200, 768, 128, false, true, 0});
  run({129, 1000, 48, false, true, 0});
  run({90, 1152, 126, false, false, 0});
  run({150, 1280, 128, false, true, 0});
  run({20000, 1280, 16, false, true, 0});
}

void test_encode() {
  Random random(59);
  const auto run = [&](const Sm90Size& size) { Suite<BFloat16>(size, random).run_encode(); };
  run({1, 64, 16, false, false, 0});
  run({65, 200, 32, false, false, 8});
  run({70, 512, 128, false, false, 0});
  // More tiles than a grid holds, so that every barrier goes through several phases.
  run({small_sizes() ? 9000 : 40000, 64, 16, false, false, 0});
  if (small_sizes()) return;
  run({64, 520, 64, false, false, 16});
  run({200, 768, 128, false, false, 0});
  run({129, 1000, 48, false, false, 0});
  run({150, 1280, 128, false, false, 0});
  run({20000, 1280, 16, false, false, 0});
}

void test_refusals() {
  const Sm90Rows<BFloat16> rows{nullptr, 4, 1280}, fewer{nullptr, 3, 1280};
  BFloat16* const out = nullptr;
  Sm90Operands<BFloat16> in{};
  in.width = 1280, in.rank = 24;
  CHECK(sm90_encode_backward(in, rows, rows, out, nullptr) == cudaErrorInvalidValue, "rank 24 must be refused");
  in.rank = 128;
  CHECK(sm90_encode_backward(in, fewer, rows, out, nullptr) == cudaErrorInvalidValue, "other rows must be refused");
  CHECK(sm90_correct_backward(in, fewer, rows, out, nullptr) == cudaErrorInvalidValue, "other rows must be refused");
  in.diagonal = true;
  CHECK(sm90_correct_backward(in, rows, rows, out, nullptr) == cudaErrorInvalidValue, "a diagonal complement must be refused");
  CHECK(sm90_encode_backward(in, rows, rows, out, nullptr) == cudaErrorInvalidValue, "a diagonal complement must be refused");
}

}  // namespace

void aniso_test::run_tests() {
  skip_without_device();
  if (!sm90_present()) {
    std::printf("skipped: no GPU of compute capability 9.0\n");
    std::exit(77);
  }
  test_refusals();
  test_encode();
  test_correct<BFloat16>();
  test_correct<Float16>();
}
