// Descriptions of matrices for the bulk copy engine. The driver's encoder is looked up at run time, so that nothing links
// against the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "aniso/storage.h"

namespace aniso {

// Gives this thread a context, which the encoder wants: a new one of autograd's has none yet, and reused memory makes no call that
// brings one.
inline cudaError_t bind_thread() {
  static thread_local const cudaError_t bound = [] {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaSetDevice(device) : error;
  }();
  return bound;
}

constexpr int32_t kBoxRows = 64;

// Boxes of kBoxRows x kColumns of a row-major matrix, under the swizzle of their rows or as they are; outside the matrix they read zero.
// `data` and the stride must be multiples of 16 bytes.
template <int kColumns, bool kSwizzled = true, typename S>
cudaError_t matrix_map(CUtensorMap* map, const S* data, int64_t rows, int64_t columns, int64_t row_stride) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  if (const cudaError_t error = bind_thread(); error != cudaSuccess) return error;
  constexpr CUtensorMapDataType kType = std::is_same_v<S, float>      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                        : std::is_same_v<S, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr size_t kRowBytes = kColumns * sizeof(S);
  static_assert(kRowBytes == 128 || kRowBytes == 32, "rows of 128 or of 32 bytes");
  constexpr CUtensorMapSwizzle kSwizzle = !kSwizzled         ? CU_TENSOR_MAP_SWIZZLE_NONE
                                          : kRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                                             : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(row_stride) * sizeof(S)};
  const cuuint32_t box[2] = {kColumns, kBoxRows}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, kType, 2, const_cast<S*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             kSwizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace aniso
