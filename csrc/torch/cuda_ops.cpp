// CUDA operators: check -> parameters -> launch on the current stream of the rows' device.
#include "cuda_ops.h"

#include <cuda_runtime_api.h>
// The stable Stream has no native handle before torch 2.13; the C shim has had this entry point all along. It is
// declared where USE_CUDA is defined, as setup.py does.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <type_traits>

#include "aniso/cuda.h"
#include "checks.h"

namespace aniso_torch {
namespace {

using aniso::BFloat16;
using aniso::Float16;
using aniso::Working;
using torch::headeronly::ScalarType;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  check_status(aoti_torch_get_current_cuda_stream(device, &stream), "the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  check(error == cudaSuccess, "aniso_ext::", op, " on CUDA: ", cudaGetErrorString(error));
}

void check_constant(const Tensor& tensor, const char* name, const Tensor& rows, ScalarType dtype, int64_t elements) {
  check(tensor.is_cuda() && tensor.get_device_index() == rows.get_device_index(), name,
                  " is not on the device of the rows, cuda:", rows.get_device_index());
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == elements, name,
                  " must be contiguous, of the right dtype, and hold ", elements, " values");
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename P>
aniso::DeviceOperands<P> checked_operands(const Tensor& y, const InitialisationTensors& in) {
  using T = typename Working<P>::type;
  check(in.input_weight.dim() == 2 && in.output_weight.dim() == 2, "the weights must be matrices");
  const int64_t width = y.size(1), rank = in.target_coordinates.numel();
  const int64_t rank_in = in.input_weight.size(0), rank_out = in.output_weight.size(1);
  const int64_t pieces = in.segments.dim() == 3 ? in.segments.size(1) : 0;
  const int64_t bucket_count = in.buckets.dim() == 2 ? in.buckets.size(1) : 0;
  const ScalarType working = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const ScalarType product = in.output_weight.scalar_type();
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  check(rank >= 2 && rank % 2 == 0, "the rank must be even and at least 2, got ", rank);
  check(rank_in == rank || rank_in == 2 * rank, "input_weight must have R or 2R rows");
  check(rank_out == rank || rank_out == 2 * rank, "output_weight must have R or 2R columns");
  check(pieces >= 3, "segments must be [M, K + 1, 3] with K of at least 2");
  check(bucket_count >= 1, "buckets must be [M, buckets]");
  check(width >= 1 && width <= kLimit && rank_out <= kLimit && pieces <= kLimit && bucket_count <= kLimit,
                  "a size exceeds ", kLimit);
  check_constant(in.input_weight, "input_weight", y, working, rank_in * width);
  check_constant(in.output_weight, "output_weight", y, product, width * rank_out);
  check_constant(in.input_bias, "input_bias", y, working, rank_in);
  check_constant(in.target_coordinates, "target_coordinates", y, working, rank);
  check_constant(in.segments, "segments", y, working, rank / 2 * 3 * pieces);
  check_constant(in.buckets, "buckets", y, ScalarType::Short, rank / 2 * bucket_count);
  check_constant(in.windows, "windows", y, ScalarType::Int, rank / 2);
  check_constant(in.scale, "scale", y, working, in.scale.numel() == 1 ? 1 : width);
  check_constant(in.offset, "offset", y, working, width);
  if (in.shift) check_constant(*in.shift, "shift", y, working, width);
  return {int32_t(width),
          int32_t(rank),
          int32_t(rank_in),
          int32_t(rank_out),
          int32_t(pieces),
          int32_t(bucket_count),
          in.scale.numel() == 1 ? 0 : 1,
          data<T>(in.input_weight),
          data<T>(in.input_bias),
          data<T>(in.target_coordinates),
          reinterpret_cast<const aniso::Segment<T>*>(data<T>(in.segments)),
          data<int16_t>(in.buckets),
          data<int32_t>(in.windows),
          data<P>(in.output_weight),
          data<T>(in.scale),
          data<T>(in.offset),
          in.shift ? data<T>(*in.shift) : nullptr};
}

template <typename S, typename P>
void run_correct(const Tensor& y, const InitialisationTensors& in, Tensor& out) {
  const aniso::DeviceOperands<P> operands = checked_operands<P>(y, in);
  const aniso::DeviceRows<S> rows{data<S>(y), y.size(0), y.stride(0), y.stride(1)};
  S* result = static_cast<S*>(out.mutable_data_ptr());
  check_launch(aniso::launch_correct<S, P>(operands, rows, result, current_stream(y.get_device_index())), "correct");
}

}  // namespace

Tensor correct_on_cuda(const Tensor& y, const InitialisationTensors& in) {
  check(y.is_cuda(), "y must be a CUDA tensor");
  check(y.dim() == 2 && y.size(1) == in.output_weight.size(0), "y must be [N, ", in.output_weight.size(0),
                  "]");
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor out = torch::stable::new_empty(y, {y.size(0), y.size(1)});
  const ScalarType storage = y.scalar_type(), product = in.output_weight.scalar_type();
  if (storage == ScalarType::Double && product == ScalarType::Double) {
    run_correct<double, double>(y, in, out);
  } else if (storage == ScalarType::Float && product == ScalarType::Float) {
    run_correct<float, float>(y, in, out);
  } else if (storage == ScalarType::Half && product == ScalarType::Float) {
    run_correct<Float16, float>(y, in, out);
  } else if (storage == ScalarType::BFloat16 && product == ScalarType::Float) {
    run_correct<BFloat16, float>(y, in, out);
  } else if (storage == ScalarType::BFloat16 && product == ScalarType::BFloat16) {
    run_correct<BFloat16, BFloat16>(y, in, out);
  } else {
    check(false, "no CUDA kernel for this pair of row and weight dtypes");
  }
  return out;
}

}  // namespace aniso_torch
