// The Hopper kernels against METHOD section 4 in double, for the rounded basis that they multiply with. Skipped where no GPU
// of compute capability 9.0 is visible.
#include <algorithm>
#include <string>
#include <type_traits>

#include "aniso/cuda_sm90.h"
#include "cuda_case.h"

using namespace aniso;
using namespace aniso_test;

namespace {

struct Size {
  int64_t rows;
  int32_t width, rank;
  bool diagonal, shifted;
  int64_t padding;  // elements between the rows of y
  std::string text() const {
    return " N=" + std::to_string(rows) + " D=" + std::to_string(width) + " R=" + std::to_string(rank) +
           (diagonal ? " diagonal" : "") + (shifted ? " calibrated" : "");
  }
};

constexpr int32_t kKnots = 40, kCells = 64, kBuckets = 128;

// Results that begin at a multiple of 16 bytes, as the copy engine wants them.
template <typename V>
using AlignedResult = DeviceResult<V, 64>;

std::vector<float> uniform(int64_t count, double low, double high, Random& random) {
  return random_values<float>(count, low, high, random);
}

// A cell of a radius map as the kernels read it.
struct Cell {
  Cell(double start, double rise) : start(narrow<Float16>(float(start))), rise(narrow<Float16>(float(rise))) {}
  Float16 start, rise;
};

template <typename V>
std::vector<V> padded(std::vector<V> values, size_t size) {
  values.resize(size);
  return values;
}

// Everything a row needs, in double.
struct ExactRow {
  std::vector<double> state;   // [3M + D]
  std::vector<double> unit;    // e'
  std::vector<double> result;  // e
  double smallest_radius = 1e9;
  double rounding = 0;  // of the coefficients, as they reach a row of unit length, in half ulps
};

// S: of the rows. Rows of float are only corrected.
template <typename S>
class Suite {
  static constexpr bool kFloat = std::is_same_v<S, float>;
  using B = std::conditional_t<kFloat, Float16, S>;  // of the factors of products

 public:
  Suite(const Size& size, Random& random)
      : size_(size),
        name_(std::string(Format<S>::kName) + size.text()),
        y_(random_values<S>(size.rows * stride(), -1.0 / std::sqrt(size.width), 1.0 / std::sqrt(size.width), random)),
        basis_(orthonormal_basis(size.width, size.rank, random)),
        bias_(uniform(size.rank, -0.1, 0.1, random)),
        target_(uniform(size.rank, -0.1, 0.1, random)),
        scale_(uniform(size.diagonal ? size.width : 1, 0.6, 1.1, random)),
        offset_(uniform(size.width, -0.5 / std::sqrt(size.width), 0.5 / std::sqrt(size.width), random)),
        shift_(uniform(size.width, -0.2 / std::sqrt(size.width), 0.2 / std::sqrt(size.width), random)) {
    for (const std::vector<float>* vector : {&offset_, &shift_}) {
      for (int32_t r = 0; r < size.rank; ++r) {
        double sum = 0;
        for (int32_t j = 0; j < size.width; ++j) sum += double((*vector)[size_t(j)]) * exact(basis_[size_t(j) * size.rank + r]);
        coordinates_.push_back(float(sum));
      }
    }
    const int32_t blocks = size.rank / 2;
    for (int32_t block = 0; block < blocks; ++block) {
      double start = 0, value = 0, slope = 1;
      for (int32_t piece = 0; piece <= kKnots; ++piece) {
        segments_.push_back({float(start), float(value), float(piece == kKnots ? value / start : slope)});
        const double length = random.uniform(0.01, 0.03);
        start += length;
        value += slope * length;
        slope = random.uniform(0.5, 2.0);
      }
      const Segment<float>* map = &segments_[size_t(block) * (kKnots + 1)];
      const double last = double(map[kKnots].start);
      map_scales_[size_t(block)] = float(kCells / last);
      map_scales_[most_blocks() + size_t(block)] = map[kKnots].slope;
      map_scales_[2 * most_blocks() + size_t(block)] = float(last);
      const auto added = [&](int32_t cell) {  // to the last slope, in the unit of the cells
        const double rho = last * cell / kCells;
        return (exact_map(block, rho) - rho * double(map[kKnots].slope)) / last;
      };
      for (int32_t cell = 0; cell < kCells; ++cell) {
        const bool coarse = random.uniform(0, 1) < 0.1;
        cells_.push_back(coarse ? Cell{NAN, NAN} : Cell{added(cell), added(cell + 1) - added(cell)});
      }
      cells_.push_back({0, 0});
      index_knots(map);
    }
    cells_.resize(most_blocks() * (kCells + 1), {0, 0});
    for (int32_t j = 0; j < size.width; ++j) {
      for (int32_t r = 0; r < sm90_columns(size.rank); ++r) padded_.push_back(r < size.rank ? basis_[size_t(j) * size.rank + r] : B{});
    }
  }

  void run() {
    const OnDevice<S> y(y_);
    const OnDevice<B> basis(padded_), reordered(streams() ? shuffled<8, false>(basis_, size_.width, size_.rank) : shuffled<16 / sizeof(S)>(basis_, size_.width, size_.rank));
    const OnDevice<float> coordinates(coordinates_), bias(bias_), target(target_), map_scales(map_scales_), scale(scale_), offset(offset_), shift(shift_);
    const OnDevice<Cell> cells(cells_);
    const OnDevice<Segment<float>> segments(segments_);
    const OnDevice<int16_t> buckets(buckets_);
    const OnDevice<int32_t> windows(windows_);
    const Sm90Operands<B> in{size_.width,
                             size_.rank,
                             kCells,
                             size_.diagonal,
                             basis.data(),
                             reordered.data(),
                             bias.data(),
                             target.data(),
                             coordinates.data(),
                             coordinates.data() + size_.rank,
                             reinterpret_cast<const uint32_t*>(cells.data()),
                             map_scales.data(),
                             kKnots + 1,
                             kBuckets,
                             segments.data(),
                             buckets.data(),
                             windows.data(),
                             scale.data(),
                             offset.data(),
                             size_.shifted ? shift.data() : nullptr};
    const Sm90Rows<S> rows{y.data(), size_.rows, stride()};

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
      if (!size_.diagonal && !streams() && size_.rank % 16 == 0) {
        AlignedResult<S> result(size_.rows * state_columns());
        CHECK_CUDA(sm90_encode(in, rows, result.data(), nullptr));
        state = result.fetch("encode " + name_);
      }
      if (!size_.diagonal && !streams()) {
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
      check_distance(&corrected[size_t(i * size_.width)], row.result, 1.01 * Format<S>::kHalfUlp + 2 * rounding, "correct", i);
      for (size_t j = 0; j < expected_sums.size(); ++j) expected_sums[j] += row.unit[j];
      allowed_sum += rounding;
      if (!state.empty()) check_state(&state[size_t(i * state_columns())], row, i);
    }
    for (size_t j = 0; j < sums.size(); ++j) {
      CHECK(std::fabs(sums[j] - expected_sums[j]) <= allowed_sum, "sums %s column %d: %g, expected %g", name_.c_str(), int(j),
            sums[j], expected_sums[j]);
    }
  }

 private:
  bool streams() const { return sm90_streams(size_.width, size_.rank); }
  size_t most_blocks() const { return size_t(sm90_columns(size_.rank)) / 2; }
  int64_t stride() const { return size_.width + size_.padding; }
  int64_t state_columns() const { return size_.rank / 2 * 3 + size_.width; }
  double y(int64_t i, int64_t j) const { return exact(y_[size_t(i * stride() + j)]); }

  // [D, R], rounded; Gram-Schmidt, twice, in double.
  static std::vector<B> orthonormal_basis(int32_t width, int32_t rank, Random& random) {
    std::vector<std::vector<double>> columns;
    for (int32_t r = 0; r < rank; ++r) {
      std::vector<double> column;
      for (int32_t j = 0; j < width; ++j) column.push_back(random.uniform(-1, 1));
      for (int32_t pass = 0; pass < 2; ++pass) {
        for (const std::vector<double>& other : columns) {
          double along = 0;
          for (int32_t j = 0; j < width; ++j) along += column[size_t(j)] * other[size_t(j)];
          for (int32_t j = 0; j < width; ++j) column[size_t(j)] -= along * other[size_t(j)];
        }
        double squares = 0;
        for (const double value : column) squares += value * value;
        for (double& value : column) value /= std::sqrt(squares);
      }
      columns.push_back(std::move(column));
    }
    std::vector<B> basis;
    for (int32_t j = 0; j < width; ++j) {
      for (const std::vector<double>& column : columns) basis.push_back(narrow<B>(float(column[size_t(j)])));
    }
    return basis;
  }

  double exact_map(int32_t block, double rho) const {
    const Segment<float>* map = &segments_[size_t(block) * (kKnots + 1)];
    int32_t piece = 0;
    while (piece < kKnots && double(map[piece + 1].start) <= rho) ++piece;
    return double(map[piece].value) + (rho - double(map[piece].start)) * double(map[piece].slope);
  }

  double map(int32_t block, double rho) const {
    const double place = std::min<double>(rho * double(map_scales_[size_t(block)]), kCells);
    const int32_t index = int32_t(place);
    const Cell& cell = cells_[size_t(block) * (kCells + 1) + size_t(index)];
    const double start = exact(cell.start), rise = exact(cell.rise);
    if (std::isnan(start)) return exact_map(block, rho);
    return rho * double(map_scales_[most_blocks() + size_t(block)]) + double(map_scales_[2 * most_blocks() + size_t(block)]) * (start + rise * (place - index));
  }

  // As knot_buckets of aniso_ext/ops/operands.py.
  void index_knots(const Segment<float>* map) {
    const float bucket_scale = float(kBuckets) / map[kKnots].start;
    std::vector<int32_t> of_knot;
    for (int32_t knot = 1; knot <= kKnots; ++knot) of_knot.push_back(bucket_of(map[knot].start, bucket_scale, kBuckets));
    int32_t window = 0;
    std::vector<int32_t> below;
    for (int32_t bucket = 0; bucket < kBuckets; ++bucket) {
      const auto first = std::lower_bound(of_knot.begin(), of_knot.end(), bucket);
      const auto last = std::upper_bound(of_knot.begin(), of_knot.end(), bucket);
      below.push_back(int32_t(first - of_knot.begin()));
      window = std::max(window, int32_t(last - first));
    }
    for (const int32_t count : below) buckets_.push_back(int16_t(std::min(count, kKnots - window)));
    windows_.push_back(window);
  }

  ExactRow exact_row(int64_t i) const {
    ExactRow row;
    const int32_t blocks = size_.rank / 2, width = size_.width;
    std::vector<double> c_t(size_t(size_.rank)), mapped(c_t.size());
    row.state.resize(size_t(state_columns()));
    double coefficients = 0;
    for (int32_t r = 0; r < size_.rank; ++r) {
      double sum = double(bias_[size_t(r)]);
      for (int32_t j = 0; j < width; ++j) sum += y(i, j) * exact(basis_[size_t(j) * size_.rank + r]);
      c_t[size_t(r)] = sum;
    }
    for (int32_t block = 0; block < blocks; ++block) {
      const size_t at = 2 * size_t(block);
      const double a = c_t[at] + double(target_[at]), b = c_t[at + 1] + double(target_[at + 1]);
      const double length = std::hypot(a, b), radius = map(block, std::hypot(length, 1e-6));
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
        const double q = exact(basis_[size_t(j) * size_.rank + r]);
        rebuilt += q * mapped[size_t(r)];
        removed += q * c_t[size_t(r)];
      }
      const double v0 = double(scale_[size_.diagonal ? size_t(j) : 0]) * (y(i, j) - removed) + double(offset_[size_t(j)]);
      row.state[size_t(3 * blocks + j)] = v0;
      row.unit.push_back(rebuilt + v0);
      squares += row.unit.back() * row.unit.back();
      row_squares += y(i, j) * y(i, j);
    }
    double shifted_squares = 0;
    for (int32_t j = 0; j < width; ++j) {
      row.unit[size_t(j)] /= std::sqrt(squares);
      row.result.push_back(row.unit[size_t(j)] + (size_.shifted ? double(shift_[size_t(j)]) : 0));
      shifted_squares += row.result.back() * row.result.back();
    }
    for (double& value : row.result) value /= std::sqrt(shifted_squares);
    // Of the coefficients and, as large, of a norm that takes the basis for orthonormal.
    row.rounding = 2 * std::sqrt(coefficients / squares);
    // Of the factors of p: a map, which has slopes up to 2 here, and what it replaces bring them to w.
    if (kFloat) row.rounding += (2 + double(scale_[0])) * std::sqrt(row_squares / squares);
    return row;
  }

  void check_distance(const S* got, const std::vector<double>& expected, double allowed, const char* what, int64_t i) const {
    double squares = 0;
    for (size_t j = 0; j < expected.size(); ++j) {
      const double difference = exact(got[j]) - expected[j];
      squares += difference * difference;
    }
    CHECK(std::sqrt(squares) <= allowed, "%s %s row %d: off by %.3g, allowed %.3g", what, name_.c_str(), int(i),
          std::sqrt(squares), allowed);
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
    check_distance(got + polar, v0, allowed, "v0", i);
  }

  Size size_;
  std::string name_;
  std::vector<S> y_;
  std::vector<B> basis_, padded_;
  std::vector<float> bias_, target_, scale_, offset_, shift_, coordinates_;
  std::vector<float> map_scales_ = std::vector<float>(3 * most_blocks());
  std::vector<Segment<float>> segments_;
  std::vector<Cell> cells_;
  std::vector<int16_t> buckets_;
  std::vector<int32_t> windows_;
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
  if (small_sizes()) return;
  Suite<S>({300, 1280, 256, false, true, 0}, random).run();
  Suite<S>({129, 1544, 96, false, false, 16}, random).run();
  Suite<S>({90, 4096, 200, false, true, 0}, random).run();
  // More tiles than a grid holds.
  Suite<S>({40000, 144, 140, false, true, 0}, random).run();
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
