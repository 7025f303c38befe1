// CUDA launchers. They check their arguments and the limits of the grid, launch on the given stream of the current
// device and return the error of the launch; they never wait for the device.
//
// S is the storage format of the rows, P the format of the weights, T the format of sums (Working<P>), as in
// row_kernels.h. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "aniso/block_math.h"
#include "aniso/storage.h"

namespace aniso {

// The folded operands of aniso_ext/ops/operands.py. R_in and R_out are R or 2R; both are R for the
// scalar complement alone.
template <typename P>
struct DeviceOperands {
  using T = typename Working<P>::type;

  int32_t width;     // D
  int32_t rank;      // R
  int32_t rank_in;   // R_in
  int32_t rank_out;  // R_out
  int32_t pieces;    // K + 1
  int32_t bucket_count;
  int32_t scale_stride;         // 0 where one scale serves every column
  const T* input_weight;        // [R_in, D]
  const T* input_bias;          // [R_in]
  const T* target_coordinates;  // [R]
  const Segment<T>* segments;   // [M, K + 1]
  const int16_t* buckets;       // [M, bucket_count]
  const int32_t* windows;       // [M]
  const P* output_weight;       // [D, R_out]
  const T* scale;               // [1] or [D]
  const T* offset;              // [D]
  const T* shift;               // [D] or null
};

// Rows [N, D] of any strides, in elements.
template <typename S>
struct DeviceRows {
  const S* data;
  int64_t count;
  int64_t row_stride;
  int64_t column_stride;
};

// out [N, D], contiguous. Defined for (double, double), (float, float), (Float16, float), (BFloat16, float) and
// (BFloat16, BFloat16). cudaErrorInvalidValue: an argument is out of range, or one row's 2R coefficients do not fit the
// shared memory of a block.
template <typename S, typename P>
cudaError_t launch_correct(const DeviceOperands<P>& operands, const DeviceRows<S>& y, S* out, cudaStream_t stream);

}  // namespace aniso
