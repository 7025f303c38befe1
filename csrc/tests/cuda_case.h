// Shared by the tests of the CUDA kernels: device copies, guarded outputs, sizes, and a case of an initialisation whose
// rows are computed in double through both matrix products.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "aniso/cuda.h"
#include "aniso/cuda_sm90.h"
#include "initialise_oracle.h"
#include "normalise_oracle.h"

namespace aniso_test {

using aniso::DeviceOperands;
using aniso::DeviceRows;
using aniso::Products;
using aniso::Working;
using aniso::Workspace;

#define CHECK_CUDA(call)                                                     \
  do {                                                                       \
    const cudaError_t error = (call);                                        \
    CHECK(error == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error)); \
  } while (false)

inline void skip_without_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    std::exit(77);
  }
}

// ANISO_TEST_SMALL=1 leaves only small sizes, for compute-sanitizer.
inline bool small_sizes() {
  const char* small = std::getenv("ANISO_TEST_SMALL");
  return small != nullptr && std::string(small) != "0";
}

// A copy of host values on the device, released with it.
template <typename V>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<V>& values) {
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), values.size() * sizeof(V) + 1));
    CHECK_CUDA(cudaMemcpy(data_, values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  V* data() const { return data_; }

 private:
  V* data_ = nullptr;
};

// A result on the device between two bands that must not change; all bytes are 0xa5 at first, a poison in every format. The
// usual band leaves it one element past an aligned address where the format is smaller than 16 bytes.
template <typename V, int64_t kBand = 65>
class DeviceResult {
 public:
  explicit DeviceResult(int64_t size) : host_(size_t(2 * kBand + size)), size_(size) {
    std::memset(static_cast<void*>(host_.data()), 0xa5, host_.size() * sizeof(V));
    device_.reset(new OnDevice<V>(host_));
  }
  V* data() const { return device_->data() + kBand; }
  std::vector<V> fetch(const std::string& name) {
    const std::vector<V> before(host_);
    CHECK_CUDA(cudaMemcpy(host_.data(), device_->data(), host_.size() * sizeof(V), cudaMemcpyDeviceToHost));
    const size_t band = size_t(kBand) * sizeof(V), end = size_t(kBand + size_);
    CHECK(std::memcmp(host_.data(), before.data(), band) == 0 &&
              std::memcmp(host_.data() + end, before.data() + end, band) == 0,
          "%s: wrote outside its rows", name.c_str());
    return std::vector<V>(host_.begin() + kBand, host_.begin() + kBand + size_);
  }

 private:
  std::vector<V> host_;
  int64_t size_;
  std::unique_ptr<OnDevice<V>> device_;
};

// Poisoned scratch memory of the size that a launcher asks for.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(int64_t bytes) : bytes_(bytes), memory_(std::vector<uint8_t>(size_t(bytes), 0xff)) {}
  Workspace get() const { return {memory_.data(), bytes_}; }

 private:
  int64_t bytes_;
  OnDevice<uint8_t> memory_;
};

// Rows [N, columns] whose rows and columns lie apart where `spread`.
template <typename S>
class SpreadRows {
 public:
  SpreadRows(int64_t rows, int32_t columns, bool spread, double low, double high, Random& random)
      : rows_(rows),
        column_stride_(spread ? 3 : 1),
        row_stride_(int64_t(columns) * column_stride_ + (spread ? 5 : 0)),
        values_(random_values<S>(rows * row_stride_, low, high, random)) {}
  double operator()(int64_t i, int64_t j) const { return exact(values_[size_t(i * row_stride_ + j * column_stride_)]); }
  void set(int64_t i, int64_t j, double value) {
    values_[size_t(i * row_stride_ + j * column_stride_)] = aniso::narrow<S>(typename Working<S>::type(value));
  }
  // A copy on the device and its description.
  struct Copy {
    OnDevice<S> memory;
    DeviceRows<S> rows;
    explicit Copy(const SpreadRows& source)
        : memory(source.values_), rows{memory.data(), source.rows_, source.row_stride_, source.column_stride_} {}
  };

 private:
  int64_t rows_, column_stride_, row_stride_;
  std::vector<S> values_;
};

// The operands of an initialisation on the host and on the device.
template <typename T>
class InitialiseCase {
 public:
  InitialiseCase(const Shape& shape, Random& random)
      : shape(shape),
        constants(shape, random),
        oracle_(constants),
        input_weight_(random_values<T>(int64_t(shape.rank_in()) * shape.width, -0.4, 0.4, random)),
        output_weight_(random_values<T>(int64_t(shape.width) * shape.rank_out(), -0.4, 0.4, random)),
        input_weight_copy_(input_weight_),
        output_weight_copy_(output_weight_),
        bias_(constants.input_bias),
        target_(constants.target_coordinates),
        scale_(constants.scale),
        offset_(constants.offset),
        shift_(constants.shift),
        segments_(constants.maps.segments),
        buckets_(constants.maps.buckets),
        windows_(constants.maps.windows) {}

  DeviceOperands<T> operands() const {
    DeviceOperands<T> in{};
    in.width = shape.width;
    in.rank = shape.rank;
    in.rank_in = shape.rank_in();
    in.rank_out = shape.rank_out();
    in.pieces = shape.knots + 1;
    in.bucket_count = shape.bucket_count;
    in.scale_stride = shape.complement == Complement::scalar ? 0 : 1;
    in.input_weight = input_weight_copy_.data();
    in.input_bias = bias_.data();
    in.target_coordinates = target_.data();
    in.segments = segments_.data();
    in.buckets = buckets_.data();
    in.windows = windows_.data();
    in.output_weight = output_weight_copy_.data();
    in.scale = scale_.data();
    in.offset = offset_.data();
    in.shift = shape.shifted ? shift_.data() : nullptr;
    return in;
  }

  double input_weight(int64_t r, int64_t j) const { return double(input_weight_[size_t(r * shape.width + j)]); }
  double output_weight(int64_t j, int64_t r) const { return double(output_weight_[size_t(j * shape.rank_out() + r)]); }
  double scale(int64_t j) const { return double(constants.scale[size_t(j)]); }
  std::vector<double> shift() const {
    return shape.shifted ? std::vector<double>(constants.shift.begin(), constants.shift.end()) : std::vector<double>();
  }

  // Blocks of a row. A sum of n products in T is off by at most n epsilon/2 of its absolute terms.
  template <typename Row>
  std::vector<BlockOracle> blocks(const Row& y) const {
    std::vector<double> projected(size_t(shape.rank_in())), terms(projected.size());
    for (int32_t r = 0; r < shape.rank_in(); ++r) {
      for (int32_t j = 0; j < shape.width; ++j) {
        const double product = input_weight(r, j) * y(j);
        projected[size_t(r)] += product;
        terms[size_t(r)] += std::fabs(product);
      }
      terms[size_t(r)] *= shape.width;
    }
    std::vector<BlockOracle> result;
    for (int32_t block = 0; block < shape.rank / 2; ++block) result.push_back(oracle_.block(projected, terms, block));
    return result;
  }

  // w, or v0 where the mapped coordinates are left out.
  template <typename Row>
  std::vector<Expected> rebuilt(const std::vector<BlockOracle>& blocks, const Row& y, bool mapped) const {
    std::vector<Expected> k(size_t(shape.rank_out()));
    for (size_t block = 0; block < blocks.size(); ++block) {
      for (int32_t c = 0; c < 2; ++c) {
        k[2 * block + size_t(c)] = blocks[block].coefficient(c, mapped);
        if (shape.complement != Complement::scalar) {
          k[size_t(shape.rank) + 2 * block + size_t(c)] = blocks[block].centred(c);
        }
      }
    }
    std::vector<Expected> w;
    for (int32_t j = 0; j < shape.width; ++j) {
      double sum = 0, sum_terms = 0;
      for (int32_t r = 0; r < shape.rank_out(); ++r) {
        const double weight = output_weight(j, r);
        sum += weight * k[size_t(r)].value;
        sum_terms += std::fabs(weight) * (k[size_t(r)].terms + shape.rank_out() * std::fabs(k[size_t(r)].value));
      }
      const double kept = scale(j) * y(j), offset = double(constants.offset[size_t(j)]);
      w.push_back({sum + kept + offset, sum_terms + 2 * (std::fabs(kept) + std::fabs(offset))});
    }
    return w;
  }

  NormaliseOracle normalised(const std::vector<Expected>& w, bool calibrated) const {
    std::vector<double> values, terms;
    for (const Expected& e : w) values.push_back(e.value), terms.push_back(e.terms);
    return NormaliseOracle(values, terms, calibrated ? shift() : std::vector<double>());
  }

  Shape shape;
  Constants<T> constants;

 private:
  InitialiseOracle<T> oracle_;
  std::vector<T> input_weight_, output_weight_;
  OnDevice<T> input_weight_copy_, output_weight_copy_, bias_, target_, scale_, offset_, shift_;
  OnDevice<aniso::Segment<T>> segments_;
  OnDevice<int16_t> buckets_;
  OnDevice<int32_t> windows_;
};

// Roundings of sums per epsilon: factors of split products keep 16 bits, 2^-16 = 128 float epsilons.
template <typename S>
double product_roundings(Products products) {
  const bool split = !std::is_same_v<S, double> && (products == Products::split || !std::is_same_v<S, float>);
  return split ? 8 + 2 * 128 : 8;
}

// Where thread `quarter` of four has what it holds of 4 run columns of a product, pairs 4 pair + quarter, as neighbours of the matrix, pairs
// run/2 quarter + pair.
inline int32_t neighbours_place(int32_t i, int32_t run) {
  return i / (4 * run) * (4 * run) + i % 8 / 2 * run + i % (4 * run) / 8 * 2 + i % 2;
}

// A basis [D, R] in the order of aniso/cuda_sm90.h, its rows alone or its columns too. kRun: as many numbers of a row as have 16 bytes.
template <int32_t kRun = 8, bool kColumnsToo = true, typename S>
std::vector<S> shuffled(const std::vector<S>& basis, int32_t width, int32_t rank) {
  const int32_t columns = aniso::sm90_columns(rank);
  std::vector<S> result(size_t(aniso::sm90_padded(width)) * size_t(columns));
  for (int32_t j = 0; j < aniso::sm90_padded(width); ++j) {
    for (int32_t r = 0; r < columns; ++r) {
      const int32_t row = neighbours_place(j, kRun), column = kColumnsToo ? neighbours_place(r, 8) : r;
      if (row < width && column < rank) {
        result[size_t(j) * size_t(columns) + size_t(r)] = basis[size_t(row) * size_t(rank) + size_t(column)];
      }
    }
  }
  return result;
}

// Largest relative error of a gradient's row, in the 2-norm. `turn` is the largest of its blocks: the part that comes through
// such a block is off by 4 turn roundings (BlockOracle::combined).
template <typename S>
double gradient_tolerance(Products products, double turn = 0) {
  const double roundings = epsilon<typename Working<S>::type>() * product_roundings<S>(products);
  return (50 + 4 * turn) * roundings + 2 * Format<S>::kHalfUlp;
}

// Whether a row is close to its expectation in the 2-norm.
template <typename S>
void check_row_norm(const S* got, const std::vector<double>& expected, double tolerance, const std::string& name,
                    int64_t row) {
  double error = 0, size = 0;
  bool finite = true;
  for (size_t j = 0; j < expected.size(); ++j) {
    const double difference = exact(got[j]) - expected[j];
    finite = finite && std::isfinite(difference);
    error += difference * difference;
    size += expected[j] * expected[j];
  }
  CHECK(finite && std::sqrt(error) <= tolerance * std::sqrt(size) + 1e-6 * Format<S>::kHalfUlp,
        "%s row %d: relative error %.3g, allowed %.3g", name.c_str(), int(row), std::sqrt(error / size), tolerance);
}

}  // namespace aniso_test
