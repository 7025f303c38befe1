// What the CUDA operators share: checks of their tensors, parameters of the launchers, workspace and stream.
#pragma once

#include <cuda_runtime_api.h>
// The stable Stream has no native handle before torch 2.13; the C shim has had this entry point all along. It is
// declared where USE_CUDA is defined, as setup.py does.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <type_traits>

#include "aniso/cuda.h"
#include "arguments.h"
#include "checks.h"

namespace aniso_torch {

using aniso::Working;
using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

// Follows torch.get_float32_matmul_precision(); aniso_ext/ops/cuda_native.py keeps it up to date.
aniso::Products float32_products();

inline cudaStream_t stream_of(const Tensor& rows) {
  void* stream = nullptr;
  check_status(aoti_torch_get_current_cuda_stream(rows.get_device_index(), &stream), "the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so that no later call reports it again
  const char* hint = error == cudaErrorInvalidValue
                         ? " (the coefficients of a large rank may not fit the shared memory of this GPU: use backend='reference')"
                         : "";
  check(false, "aniso_ext::", op, " on CUDA: ", cudaGetErrorString(error), hint);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
constexpr ScalarType working_dtype() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

inline void check_rows(const Tensor& tensor, const char* name, const Tensor& like, int64_t columns) {
  check(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        " is not on the device of the rows, cuda:", like.get_device_index());
  check(tensor.dim() == 2 && tensor.size(0) == like.size(0) && tensor.size(1) == columns, name, " must be [",
        like.size(0), ", ", columns, "]");
  check(tensor.scalar_type() == like.scalar_type(), name, " differs from the other rows in dtype");
}

inline void check_constant(const Tensor& tensor, const char* name, const Tensor& rows, ScalarType dtype,
                           int64_t elements) {
  check(tensor.is_cuda() && tensor.get_device_index() == rows.get_device_index(), name,
        " is not on the device of the rows, cuda:", rows.get_device_index());
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == elements, name,
        " must be contiguous, of the dtype of the sums, and hold ", elements, " values");
}

constexpr int64_t kLargestSize = std::numeric_limits<int32_t>::max() / 4;

template <typename T>
aniso::DeviceOperands<T> checked_operands(const Tensor& y, const InitialisationTensors& in) {
  check(in.input_weight.dim() == 2 && in.output_weight.dim() == 2, "the weights must be matrices");
  const int64_t width = in.output_weight.size(0), rank = in.target_coordinates.numel();
  const int64_t rank_in = in.input_weight.size(0), rank_out = in.output_weight.size(1);
  const int64_t pieces = in.segments.dim() == 3 ? in.segments.size(1) : 0;
  const int64_t bucket_count = in.buckets.dim() == 2 ? in.buckets.size(1) : 0;
  constexpr ScalarType working = working_dtype<T>();
  check(rank >= 2 && rank % 2 == 0, "the rank must be even and at least 2, got ", rank);
  check(rank_in == rank || rank_in == 2 * rank, "input_weight must have R or 2R rows");
  check(rank_out == rank || rank_out == 2 * rank, "output_weight must have R or 2R columns");
  check(rank_in <= rank_out, "2R rows of input_weight need 2R columns of output_weight");
  check(pieces >= 3, "segments must be [M, K + 1, 3] with K of at least 2");
  check(bucket_count >= 1, "buckets must be [M, buckets]");
  check(width >= 1 && width <= kLargestSize && rank_out <= kLargestSize && pieces <= kLargestSize &&
            bucket_count <= kLargestSize,
        "a size exceeds ", kLargestSize);
  check_rows(y, "y", y, width);
  check_constant(in.input_weight, "input_weight", y, working, rank_in * width);
  check_constant(in.output_weight, "output_weight", y, working, width * rank_out);
  check_constant(in.input_bias, "input_bias", y, working, rank_in);
  check_constant(in.target_coordinates, "target_coordinates", y, working, rank);
  check_constant(in.segments, "segments", y, working, rank / 2 * 3 * pieces);
  check_constant(in.buckets, "buckets", y, ScalarType::Short, rank / 2 * bucket_count);
  check_constant(in.windows, "windows", y, ScalarType::Int, rank / 2);
  check_constant(in.scale, "scale", y, working, rank_out == rank ? 1 : width);
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
          data<T>(in.output_weight),
          data<T>(in.scale),
          data<T>(in.offset),
          in.shift ? data<T>(*in.shift) : nullptr};
}

template <typename S>
aniso::DeviceRows<S> device_rows(const Tensor& rows) {
  return {data<S>(rows), rows.size(0), rows.stride(0), rows.stride(1)};
}

// Memory for one launch. Torch's allocator gives it to no other stream before the work queued so far on this one is done.
class LaunchMemory {
 public:
  LaunchMemory(const Tensor& like, int64_t bytes)
      : bytes_(bytes), memory_(torch::stable::new_empty(like, {bytes}, ScalarType::Byte)) {}
  aniso::Workspace workspace() { return {bytes_ > 0 ? memory_.mutable_data_ptr() : nullptr, bytes_}; }

 private:
  int64_t bytes_;
  Tensor memory_;
};

template <typename S>
LaunchMemory memory_for_rows(const Tensor& rows, int64_t values_a_row) {
  int64_t bytes = 0;
  check_launch(aniso::rows_workspace<S>(rows.size(0), int32_t(values_a_row), &bytes), "workspace");
  return LaunchMemory(rows, bytes);
}

// Calls run(S{}) for the storage dtype of the rows.
template <typename Run>
void dispatch(const Tensor& rows, const Run& run) {
  switch (rows.scalar_type()) {
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(aniso::Float16{});
    case ScalarType::BFloat16:
      return run(aniso::BFloat16{});
    default:
      check(false, "no CUDA kernel for this dtype: rows must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace aniso_torch
