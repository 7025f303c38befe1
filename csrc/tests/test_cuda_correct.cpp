// The CUDA kernel of `correct` against METHOD section 4 in double, through both matrix products. Skipped without a GPU.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string>

#include "aniso/cuda.h"
#include "initialise_oracle.h"
#include "normalise_oracle.h"

using namespace aniso;
using namespace aniso_test;

namespace {

#define CHECK_CUDA(call)                                                     \
  do {                                                                       \
    const cudaError_t error = (call);                                        \
    CHECK(error == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error)); \
  } while (false)

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

constexpr int64_t kBand = 64;  // elements before and after the output that must not change

template <typename S, typename P>
class Case {
 public:
  using T = typename Working<P>::type;

  // With `spread`, rows and columns of y lie apart.
  Case(const Shape& shape, bool spread, Random& random)
      : shape_(shape),
        column_stride_(spread ? 3 : 1),
        row_stride_(shape.width * column_stride_ + (spread ? 5 : 0)),
        constants_(shape, random),
        oracle_(constants_),
        name_(std::string("correct ") + Format<S>::kName + "/" + Format<P>::kName + " " + shape.text() +
              (spread ? " spread" : "")),
        y_(random_values<S>(shape.rows * row_stride_, -0.3, 0.3, random)),
        input_weight_(random_values<T>(int64_t(shape.rank_in()) * shape.width, -0.4, 0.4, random)),
        output_weight_(random_values<P>(int64_t(shape.width) * shape.rank_out(), -0.4, 0.4, random)) {}

  void run() {
    const std::vector<S> out = launch();
    for (int64_t i = 0; i < shape_.rows; ++i) check_row(i, out.data() + kBand + i * shape_.width);
    if (shape_.rows < 2) return;
    const int64_t poisoned = shape_.rows / 2;
    y_[size_t(poisoned * row_stride_)] = narrow<S>(T(NAN));
    const std::vector<S> other = launch();
    for (int64_t i = 0; i < shape_.rows * shape_.width; ++i) {
      const size_t at = size_t(kBand + i);
      const bool same = std::memcmp(&out[at], &other[at], sizeof(S)) == 0;
      CHECK(i / shape_.width == poisoned ? std::isnan(exact(other[at])) : same, "%s: a NaN in row %d, now row %d is %g",
            name_.c_str(), int(poisoned), int(i / shape_.width), exact(other[at]));
    }
  }

 private:
  std::vector<S> launch() const {
    const OnDevice<S> y(y_);
    const OnDevice<T> input_weight(input_weight_);
    const OnDevice<P> output_weight(output_weight_);
    const OnDevice<T> bias(constants_.input_bias), target(constants_.target_coordinates), scale(constants_.scale);
    const OnDevice<T> offset(constants_.offset), shift(constants_.shift);
    const OnDevice<Segment<T>> segments(constants_.maps.segments);
    const OnDevice<int16_t> buckets(constants_.maps.buckets);
    const OnDevice<int32_t> windows(constants_.maps.windows);
    DeviceOperands<P> operands{};
    operands.width = shape_.width;
    operands.rank = shape_.rank;
    operands.rank_in = shape_.rank_in();
    operands.rank_out = shape_.rank_out();
    operands.pieces = shape_.knots + 1;
    operands.bucket_count = shape_.bucket_count;
    operands.scale_stride = shape_.complement == Complement::scalar ? 0 : 1;
    operands.input_weight = input_weight.data();
    operands.input_bias = bias.data();
    operands.target_coordinates = target.data();
    operands.segments = segments.data();
    operands.buckets = buckets.data();
    operands.windows = windows.data();
    operands.output_weight = output_weight.data();
    operands.scale = scale.data();
    operands.offset = offset.data();
    operands.shift = shape_.shifted ? shift.data() : nullptr;

    std::vector<S> out(size_t(2 * kBand + shape_.rows * shape_.width));
    std::memset(static_cast<void*>(out.data()), 0xa5, out.size() * sizeof(S));
    const std::vector<S> untouched(out.begin(), out.begin() + kBand);
    const OnDevice<S> result(out);
    const DeviceRows<S> rows{y.data(), shape_.rows, row_stride_, column_stride_};
    CHECK_CUDA((launch_correct<S, P>(operands, rows, result.data() + kBand, nullptr)));
    CHECK_CUDA(cudaMemcpy(out.data(), result.data(), out.size() * sizeof(S), cudaMemcpyDeviceToHost));
    const size_t band = size_t(kBand) * sizeof(S);
    CHECK(std::memcmp(out.data(), untouched.data(), band) == 0 &&
              std::memcmp(out.data() + out.size() - kBand, untouched.data(), band) == 0,
          "%s: wrote outside its rows", name_.c_str());
    return out;
  }

  double y(int64_t i, int64_t j) const { return exact(y_[size_t(i * row_stride_ + j * column_stride_)]); }

  // A sum of n products in T is off by at most n epsilon/2 of its absolute terms; kRoundings adds the steps around it.
  void check_row(int64_t i, const S* got) const {
    constexpr double kRoundings = 8;
    std::vector<double> projected(size_t(shape_.rank_in())), projected_terms(projected.size());
    for (int32_t r = 0; r < shape_.rank_in(); ++r) {
      for (int32_t j = 0; j < shape_.width; ++j) {
        const double product = exact(input_weight_[size_t(int64_t(r) * shape_.width + j)]) * y(i, j);
        projected[size_t(r)] += product;
        projected_terms[size_t(r)] += std::fabs(product);
      }
      projected_terms[size_t(r)] *= shape_.width;
    }
    std::vector<Expected> coefficients(size_t(shape_.rank_out()));
    for (int32_t block = 0; block < shape_.rank / 2; ++block) {
      const BlockOracle b = oracle_.block(projected, projected_terms, block);
      for (int32_t c = 0; c < 2; ++c) {
        coefficients[size_t(2 * block + c)] = b.coefficient(c, true);
        if (shape_.complement != Complement::scalar) coefficients[size_t(shape_.rank + 2 * block + c)] = b.centred(c);
      }
    }
    std::vector<double> w, terms, shift;
    for (int32_t j = 0; j < shape_.width; ++j) {
      double sum = 0, sum_terms = 0;
      for (int32_t r = 0; r < shape_.rank_out(); ++r) {
        const double weight = exact(output_weight_[size_t(int64_t(j) * shape_.rank_out() + r)]);
        const Expected& k = coefficients[size_t(r)];
        sum += weight * k.value;
        sum_terms += std::fabs(weight) * (k.terms + shape_.rank_out() * std::fabs(k.value));
      }
      const double kept = double(constants_.scale[size_t(j)]) * y(i, j), offset = double(constants_.offset[size_t(j)]);
      w.push_back(sum + kept + offset);
      terms.push_back(sum_terms + 2 * (std::fabs(kept) + std::fabs(offset)));
      if (shape_.shifted) shift.push_back(double(constants_.shift[size_t(j)]));
    }
    const NormaliseOracle normalised(w, terms, shift);
    for (int32_t j = 0; j < shape_.width; ++j) {
      CHECK_EXPECTED(got[j], normalised.row(size_t(j)), kRoundings, name_, i, j);
    }
  }

  Shape shape_;
  int64_t column_stride_, row_stride_;
  Constants<P> constants_;
  InitialiseOracle<P> oracle_;
  std::string name_;
  std::vector<S> y_;
  std::vector<T> input_weight_;
  std::vector<P> output_weight_;
};

template <typename S, typename P>
void test_formats() {
  Random random(41);
  for (const Complement complement : {Complement::scalar, Complement::diagonal, Complement::projected}) {
    for (const bool shifted : {false, true}) {
      Case<S, P>({0, 8, 4, 16, 8, complement, shifted}, false, random).run();
      Case<S, P>({1, 2, 2, 2, 1, complement, shifted}, false, random).run();
      Case<S, P>({33, 7, 6, 3, 8, complement, shifted}, true, random).run();
      Case<S, P>({70, 130, 66, 200, 1024, complement, shifted}, false, random).run();
      Case<S, P>({64, 200, 200, 64, 16, complement, shifted}, true, random).run();
    }
  }
  // Coefficients of a whole tile do not fit a block's shared memory: fewer rows per block.
  Case<S, P>({5, 2050, 2050, 4, 4, Complement::diagonal, true}, false, random).run();
}

void test_refusals() {
  const DeviceOperands<float> nothing{};
  const DeviceRows<float> rows{nullptr, 0, 1, 1};
  CHECK((launch_correct<float, float>(nothing, rows, nullptr, nullptr)) == cudaErrorInvalidValue,
        "empty operands must be refused");
}

}  // namespace

void aniso_test::run_tests() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    std::exit(77);
  }
  test_refusals();
  test_formats<double, double>();
  test_formats<float, float>();
  test_formats<Float16, float>();
  test_formats<BFloat16, float>();
  test_formats<BFloat16, BFloat16>();
}
