// The Hopper kernels against METHOD section 4 in double, for the rounded basis that they multiply with. Skipped where no GPU
// of compute capability 9.0 is visible.
#include <algorithm>
#include <type_traits>

#include "sm90_case.h"

using namespace aniso;
using namespace aniso_test;

namespace {

// Everything a row needs, in double.
struct ExactRow {
  std::vector<double> state;   // [3M + D]
  std::vector<double> unit;    // e'
  std::vector<double> result;  // e
  double smallest_radius = 1e9;
  double rounding = 0;  // of the coefficients, as they reach a row of unit length, in half ulps
};

// S: of the rows. Rows of float are only corrected, as are those whose basis streams.
template <typename S>
class Suite : Sm90Case<S> {
  static constexpr bool kFloat = std::is_same_v<S, float>;

 public:
  using Base = Sm90Case<S>;
  using typename Base::B;
  Suite(const Sm90Size& size, Random& random) : Base(size, random), size_(this->size()), name_(this->name()) {}

  void run() {
    const typename Base::Device device(*this);
    const Sm90Operands<B> in = device.operands();
    const Sm90Rows<S> rows = device.rows();

    AlignedResult<S> out(size_.rows * size_.width);
    CHECK_CUDA(sm90_correct(in, rows, out.data(), nullptr));
    const std::vector<S> corrected = out.fetch("correct " + name_);
    AlignedResult<S> again(size_.rows * size_.width);
    CHECK_CUDA(sm90_correct(in, rows, again.data(), nullptr));
    const std::vector<S> repeated = again.fetch("correct " + name_);
    CHECK(std::memcmp(corrected.data(), repeated.data(), corrected.size() * sizeof(S)) == 0, "%s: not repeatable",
          name_.c_str());

    std::vector<S> state;
    std::vector<double> sums;
    if constexpr (!kFloat) {
      if (!size_.diagonal && !this->streams() && size_.rank % 16 == 0) {
        AlignedResult<S> result(size_.rows * this->state_columns());
        CHECK_CUDA(sm90_encode(in, rows, result.data(), nullptr));
        state = result.fetch("encode " + name_);
      }
      if (!size_.diagonal && !this->streams()) {
        const AlignedResult<float> partial(int64_t(sm90_sum_slots(size_.width)) * (size_.width + kSm90SumColumns));
        AlignedResult<double> result(size_.width);
        CHECK_CUDA(sm90_correct_sums(in, rows, partial.data(), result.data(), nullptr));
        sums = result.fetch("sums " + name_);
      }
    }

    std::vector<double> expected_sums(size_t(size_.width), 0.0);
    double allowed_sum = 0;
    for (int64_t i = 0; i < size_.rows; ++i) {
      const ExactRow row = exact_row(i);
      // Roundings of the result and of the coefficients, then those of fp32 sums, which a map steepens.
      const double fp32 = 3e-5, rounding = Format<B>::kHalfUlp * row.rounding + fp32;
      this->check_distance(&corrected[size_t(i * size_.width)], row.result, 1.01 * Format<S>::kHalfUlp + 2 * rounding, "correct", i);
      for (size_t j = 0; j < expected_sums.size(); ++j) expected_sums[j] += row.unit[j];
      allowed_sum += rounding;
      if (!state.empty()) check_state(&state[size_t(i * this->state_columns())], row, i);
    }
    for (size_t j = 0; j < sums.size(); ++j) {
      CHECK(std::fabs(sums[j] - expected_sums[j]) <= allowed_sum, "sums %s column %d: %g, expected %g", name_.c_str(), int(j),
            sums[j], expected_sums[j]);
    }
  }

 private:
  ExactRow exact_row(int64_t i) const {
    ExactRow row;
    const int32_t blocks = this->blocks(), width = size_.width;
    const std::vector<double> c_t = this->coordinates(i);
    std::vector<double> mapped(c_t.size());
    row.state.resize(size_t(this->state_columns()));
    double coefficients = 0;
    for (int32_t block = 0; block < blocks; ++block) {
      const size_t at = 2 * size_t(block);
      const double a = c_t[at] + this->target(2 * block), b = c_t[at + 1] + this->target(2 * block + 1);
      const double length = std::hypot(a, b), radius = this->map(block, std::hypot(length, 1e-6)).radius;
      mapped[at] = radius * a / length;
      mapped[at + 1] = radius * b / length;
      row.state[size_t(block)] = b / length;
      row.state[size_t(blocks + block)] = a / length;
      row.state[size_t(2 * blocks + block)] = std::log(radius);
      row.smallest_radius = std::min({row.smallest_radius, length, radius});
      for (const size_t c : {at, at + 1}) coefficients += mapped[c] * mapped[c] + 2 * c_t[c] * c_t[c];
    }
    double squares = 0, row_squares = 0;
    for (int32_t j = 0; j < width; ++j) {
      double rebuilt = 0, removed = 0;
      for (int32_t r = 0; r < size_.rank; ++r) {
        rebuilt += this->basis(j, r) * mapped[size_t(r)];
        removed += this->basis(j, r) * c_t[size_t(r)];
      }
      const double v0 = this->scale(j) * (this->y(i, j) - removed) + this->offset(j);
      row.state[size_t(3 * blocks + j)] = v0;
      row.unit.push_back(rebuilt + v0);
      squares += row.unit.back() * row.unit.back();
      row_squares += this->y(i, j) * this->y(i, j);
    }
    double shifted_squares = 0;
    for (int32_t j = 0; j < width; ++j) {
      row.unit[size_t(j)] /= std::sqrt(squares);
      row.result.push_back(row.unit[size_t(j)] + this->shift(j));
      shifted_squares += row.result.back() * row.result.back();
    }
    for (double& value : row.result) value /= std::sqrt(shifted_squares);
    // Of the coefficients and, as large, of a norm that takes the basis for orthonormal.
    row.rounding = 2 * std::sqrt(coefficients / squares);
    // Of the factors of p: a map, which has slopes up to 2 here, and what it replaces bring them to w.
    if (kFloat) row.rounding += (2 + this->scale(0)) * std::sqrt(row_squares / squares);
    return row;
  }

  void check_state(const S* got, const ExactRow& row, int64_t i) const {
    const size_t polar = size_t(size_.rank) / 2 * 3;
    const double fp32 = 3e-5 * (1 + 1 / row.smallest_radius);
    for (size_t j = 0; j < polar; ++j) {
      const double expected = row.state[j], allowed = 1.01 * Format<S>::kHalfUlp * std::fabs(expected) + fp32;
      CHECK(std::fabs(exact(got[j]) - expected) <= allowed, "encode %s row %d column %d: %g, expected %g", name_.c_str(), int(i),
            int(j), exact(got[j]), expected);
    }
    const std::vector<double> v0(row.state.begin() + int64_t(polar), row.state.end());
    double length = 0;
    for (const double value : v0) length += value * value;
    const double allowed = Format<S>::kHalfUlp * (1.01 * std::sqrt(length) + 2 * row.rounding) + 3e-5;
    this->check_distance(got + polar, v0, allowed, "v0", i);
  }

  const Sm90Size& size_;
  const std::string& name_;
};

template <typename S>
void test_format() {
  Random random(53);
  for (const bool diagonal : {false, true}) {
    Suite<S>({1, 64, 2, diagonal, false, 0}, random).run();
    Suite<S>({65, 200, 18, diagonal, true, 8}, random).run();
    Suite<S>({70, 512, 128, diagonal, true, 0}, random).run();
    if (small_sizes()) continue;
    Suite<S>({64, 520, 64, diagonal, false, 16}, random).run();
    Suite<S>({200, 768, 128, diagonal, true, 0}, random).run();
    Suite<S>({129, 1000, 48, diagonal, true, 0}, random).run();
    Suite<S>({90, 1152, 126, diagonal, false, 0}, random).run();
    Suite<S>({150, 1280, 128, diagonal, true, 0}, random).run();
  }
  // More tiles than a grid holds, so that every barrier goes through several phases.
  Suite<S>({small_sizes() ? 9000 : 40000, 64, 16, false, true, 0}, random).run();
  if (!small_sizes()) Suite<S>({20000, 768, 16, false, true, 0}, random).run();
}

template <typename S>
void test_streams() {
  Random random(55);
  Suite<S>({1, 136, 130, false, false, 0}, random).run();
  Suite<S>({70, 264, 256, false, true, 8}, random).run();
  Suite<S>({257, 1288, 2, false, true, 0}, random).run();
  // Cells of 32, 8 and 4 blocks of the rank in a stage.
  Suite<S>({130, 144, 132, false, true, 0, 255}, random).run();
  Suite<S>({130, 264, 254, false, true, 0, 1023}, random).run();
  Suite<S>({130, 1288, 10, false, true, 0, 2047}, random).run();
  if (small_sizes()) return;
  Suite<S>({300, 1280, 256, false, true, 0}, random).run();
  Suite<S>({129, 1544, 96, false, false, 16}, random).run();
  Suite<S>({90, 4096, 200, false, true, 0}, random).run();
  Suite<S>({90, 4096, 256, false, true, 0, 2047}, random).run();  // three stages
  Suite<S>({300, 1280, 256, false, true, 0, 511}, random).run();
  // More tiles than a grid holds.
  Suite<S>({40000, 144, 140, false, true, 0}, random).run();
  Suite<S>({40000, 144, 140, false, true, 0, 1023}, random).run();
}

void test_float() {
  Random random(54);
  Suite<float>({1, 64, 2, false, false, 0}, random).run();
  Suite<float>({65, 204, 18, false, true, 4}, random).run();
  Suite<float>({70, 512, 128, false, true, 0}, random).run();
  if (!small_sizes()) {
    Suite<float>({64, 516, 64, false, false, 8}, random).run();
    Suite<float>({200, 768, 128, false, true, 0}, random).run();
    Suite<float>({129, 1000, 48, false, true, 0}, random).run();
    Suite<float>({90, 1148, 126, false, false, 0}, random).run();
    Suite<float>({150, 1280, 128, false, true, 0}, random).run();
    Suite<float>({10000, 1280, 16, false, true, 0}, random).run();
  }
  Suite<float>({small_sizes() ? 9000 : 40000, 64, 16, false, true, 0}, random).run();
}

void test_refusals() {
  const Sm90Rows<BFloat16> rows{nullptr, 4, 8192};
  const auto refused = [&](int32_t width, int32_t rank, bool diagonal) {
    Sm90Operands<BFloat16> in{};
    in.width = width, in.rank = rank, in.diagonal = diagonal;
    CHECK(sm90_correct(in, rows, static_cast<BFloat16*>(nullptr), nullptr) == cudaErrorInvalidValue, "D=%d R=%d must be refused", width, rank);
    CHECK(sm90_encode(in, rows, static_cast<BFloat16*>(nullptr), nullptr) == cudaErrorInvalidValue, "D=%d R=%d must be refused", width, rank);
  };
  refused(4104, 128, false);
  refused(1280, 258, false);
  refused(1280, 256, true);
  refused(1288, 128, true);
  for (const int32_t cell_count : {1024, 2046, 4095}) {  // of stages that are not filled whole, or too small for one
    Sm90Operands<BFloat16> large{};
    large.width = 1280, large.rank = 256, large.cell_count = cell_count;
    CHECK(sm90_correct(large, rows, static_cast<BFloat16*>(nullptr), nullptr) == cudaErrorInvalidValue,
          "%d cells must be refused", cell_count);
  }
  Sm90Operands<Float16> of_float{};
  const Sm90Rows<float> float_rows{nullptr, 4, 1280};
  of_float.width = 1278, of_float.rank = 128;
  CHECK(sm90_correct(of_float, float_rows, static_cast<float*>(nullptr), nullptr) == cudaErrorInvalidValue, "width 1278 must be refused");
  of_float.width = 1280, of_float.diagonal = true;
  CHECK(sm90_correct(of_float, float_rows, static_cast<float*>(nullptr), nullptr) == cudaErrorInvalidValue, "a diagonal must be refused");
}

}  // namespace

void aniso_test::run_tests() {
  skip_without_device();
  if (!sm90_present()) {
    std::printf("skipped: no GPU of compute capability 9.0\n");
    std::exit(77);
  }
  test_refusals();
  test_format<BFloat16>();
  test_format<Float16>();
  test_streams<BFloat16>();
  test_streams<Float16>();
  test_float();
}
