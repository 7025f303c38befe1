// A closed form for the tests of the Hopper kernels: rows, a basis and radius maps on the host, what the kernels read of them, and the
// quantities of a row in double, for the rounded basis and the table that the kernels have.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda_case.h"

namespace aniso_test {

struct Sm90Size {
  int64_t rows;
  int32_t width, rank;
  bool diagonal, shifted;
  int64_t padding;     // elements between the rows of y
  int32_t cells = 63;  // of a radius map
  std::string text() const {
    return " N=" + std::to_string(rows) + " D=" + std::to_string(width) + " R=" + std::to_string(rank) +
           (diagonal ? " diagonal" : "") + (shifted ? " calibrated" : "");
  }
};

// Results that begin at a multiple of 16 bytes, as the copy engine wants them.
template <typename V>
using AlignedResult = DeviceResult<V, 64>;

inline std::vector<float> uniform(int64_t count, double low, double high, Random& random) {
  return random_values<float>(count, low, high, random);
}

// A cell of a radius map as the kernels read it.
struct Cell {
  Cell(double start, double rise) : start(aniso::narrow<aniso::Float16>(float(start))), rise(aniso::narrow<aniso::Float16>(float(rise))) {}
  aniso::Float16 start, rise;
};

template <typename V>
std::vector<V> padded(std::vector<V> values, size_t size) {
  values.resize(size);
  return values;
}

// S: of the rows.
template <typename S>
class Sm90Case {
 public:
  using B = std::conditional_t<std::is_same_v<S, float>, aniso::Float16, S>;  // of the factors of products
  static constexpr int32_t kKnots = 40, kBuckets = 128;

  Sm90Case(const Sm90Size& size, Random& random)
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
      const aniso::Segment<float>* map = &segments_[size_t(block) * (kKnots + 1)];
      const double last = double(map[kKnots].start);
      map_scales_[size_t(block)] = float(size.cells / last);
      map_scales_[most_blocks() + size_t(block)] = map[kKnots].slope;
      map_scales_[2 * most_blocks() + size_t(block)] = float(last);
      const auto added = [&](int32_t cell) {  // to the last slope, in the unit of the cells
        const double rho = last * cell / size.cells;
        return (exact_map(block, rho).radius - rho * double(map[kKnots].slope)) / last;
      };
      for (int32_t cell = 0; cell < size.cells; ++cell) {
        const bool coarse = random.uniform(0, 1) < 0.1;
        cells_.push_back(coarse ? Cell{NAN, NAN} : Cell{added(cell), added(cell + 1) - added(cell)});
      }
      cells_.push_back({0, 0});
      index_knots(map);
    }
    cells_.resize(most_blocks() * size_t(size.cells + 1), {0, 0});
    for (int32_t j = 0; j < size.width; ++j) {
      for (int32_t r = 0; r < aniso::sm90_columns(size.rank); ++r) padded_.push_back(r < size.rank ? basis_[size_t(j) * size.rank + r] : B{});
    }
  }

  // What the kernels read.
  class Device {
   public:
    explicit Device(const Sm90Case& host)
        : host_(host),
          y_(host.y_),
          basis_(host.padded_),
          shuffled_(host.reordered()),
          coordinates_(host.coordinates_),
          bias_(host.bias_),
          target_(host.target_),
          map_scales_(host.map_scales_),
          scale_(host.scale_),
          offset_(host.offset_),
          shift_(host.shift_),
          cells_(host.cells_),
          segments_(host.segments_),
          buckets_(host.buckets_),
          windows_(host.windows_) {}

    aniso::Sm90Operands<B> operands() const {
      const Sm90Size& size = host_.size_;
      return {size.width,
              size.rank,
              size.cells,
              size.diagonal,
              basis_.data(),
              shuffled_.data(),
              bias_.data(),
              target_.data(),
              coordinates_.data(),
              coordinates_.data() + size.rank,
              reinterpret_cast<const uint32_t*>(cells_.data()),
              map_scales_.data(),
              kKnots + 1,
              kBuckets,
              segments_.data(),
              buckets_.data(),
              windows_.data(),
              scale_.data(),
              offset_.data(),
              size.shifted ? shift_.data() : nullptr};
    }
    aniso::Sm90Rows<S> rows() const { return {y_.data(), host_.size_.rows, host_.stride()}; }

   private:
    const Sm90Case& host_;
    OnDevice<S> y_;
    OnDevice<B> basis_, shuffled_;
    OnDevice<float> coordinates_, bias_, target_, map_scales_, scale_, offset_, shift_;
    OnDevice<Cell> cells_;
    OnDevice<aniso::Segment<float>> segments_;
    OnDevice<int16_t> buckets_;
    OnDevice<int32_t> windows_;
  };

  const Sm90Size& size() const { return size_; }
  const std::string& name() const { return name_; }
  int32_t blocks() const { return size_.rank / 2; }
  bool streams() const { return aniso::sm90_streams(size_.width, size_.rank); }
  int64_t stride() const { return size_.width + size_.padding; }
  int64_t state_columns() const { return blocks() * 3 + size_.width; }
  double y(int64_t i, int64_t j) const { return exact(y_[size_t(i * stride() + j)]); }

  double basis(int64_t j, int64_t r) const { return exact(basis_[size_t(j * size_.rank + r)]); }
  double scale(int64_t j) const { return double(scale_[size_.diagonal ? size_t(j) : 0]); }
  double offset(int64_t j) const { return double(offset_[size_t(j)]); }
  double shift(int64_t j) const { return size_.shifted ? double(shift_[size_t(j)]) : 0; }
  double target(int64_t r) const { return double(target_[size_t(r)]); }

  // Q^T x.
  template <typename Row>
  std::vector<double> projected(const Row& x) const {
    std::vector<double> sums(size_t(size_.rank), 0.0);
    for (int32_t j = 0; j < size_.width; ++j) {
      for (int32_t r = 0; r < size_.rank; ++r) sums[size_t(r)] += x(j) * basis(j, r);
    }
    return sums;
  }

  // c_t of row i.
  std::vector<double> coordinates(int64_t i) const {
    std::vector<double> c_t = projected([&](int32_t j) { return y(i, j); });
    for (size_t r = 0; r < c_t.size(); ++r) c_t[r] += double(bias_[r]);
    return c_t;
  }

  // T(rho) and its slope as the kernels have them, from the table or by search.
  aniso::Mapped<double> map(int32_t block, double rho) const {
    const double cell_scale = double(map_scales_[size_t(block)]), last_slope = double(map_scales_[most_blocks() + size_t(block)]);
    const double unit = double(map_scales_[2 * most_blocks() + size_t(block)]), place = std::min<double>(rho * cell_scale, size_.cells);
    const int32_t index = int32_t(place);
    const Cell& cell = cells_[size_t(block) * size_t(size_.cells + 1) + size_t(index)];
    const double start = exact(cell.start), rise = exact(cell.rise);
    if (std::isnan(start)) return exact_map(block, rho);
    return {rho * last_slope + unit * (start + rise * (place - index)), last_slope + unit * cell_scale * rise};
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

 private:
  size_t most_blocks() const { return size_t(aniso::sm90_columns(size_.rank)) / 2; }

  std::vector<B> reordered() const {
    if (streams()) return shuffled<8, false>(basis_, size_.width, size_.rank);
    return shuffled<16 / int32_t(sizeof(S))>(basis_, size_.width, size_.rank);
  }

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
      for (const std::vector<double>& column : columns) basis.push_back(aniso::narrow<B>(float(column[size_t(j)])));
    }
    return basis;
  }

  aniso::Mapped<double> exact_map(int32_t block, double rho) const {
    const aniso::Segment<float>* map = &segments_[size_t(block) * (kKnots + 1)];
    int32_t piece = 0;
    while (piece < kKnots && double(map[piece + 1].start) <= rho) ++piece;
    const double slope = double(map[piece].slope);
    return {double(map[piece].value) + (rho - double(map[piece].start)) * slope, slope};
  }

  // As knot_buckets of aniso_ext/ops/operands.py.
  void index_knots(const aniso::Segment<float>* map) {
    const float bucket_scale = float(kBuckets) / map[kKnots].start;
    std::vector<int32_t> of_knot;
    for (int32_t knot = 1; knot <= kKnots; ++knot) of_knot.push_back(aniso::bucket_of(map[knot].start, bucket_scale, kBuckets));
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

  Sm90Size size_;
  std::string name_;
  std::vector<S> y_;
  std::vector<B> basis_, padded_;
  std::vector<float> bias_, target_, scale_, offset_, shift_, coordinates_;
  std::vector<float> map_scales_ = std::vector<float>(3 * most_blocks());
  std::vector<aniso::Segment<float>> segments_;
  std::vector<Cell> cells_;
  std::vector<int16_t> buckets_;
  std::vector<int32_t> windows_;
};

}  // namespace aniso_test
