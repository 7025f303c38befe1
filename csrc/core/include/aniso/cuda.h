// CUDA launchers of the portable kernels, sm_80 and newer. They check their arguments and the limits of the grid, launch
// on the given stream of the current device and return the error of the launch. They never wait for the device and
// allocate nothing, so that they can be captured in a graph.
//
// S is the storage format of the rows, T the format of sums and of all constants (Working<S>): (double, double),
// (float, float), (Float16, float) and (BFloat16, float). All pointers are device pointers. Results are contiguous, do
// not depend on how the device schedules blocks, and a row's result does not depend on the other rows.
//
// cudaErrorInvalidValue: an argument is out of range, the workspace is too small, or the coefficients of four rows do not
// fit the shared memory of a block.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "aniso/block_math.h"
#include "aniso/storage.h"

namespace aniso {

// How matrix products are computed. `split` (tensor cores, 16 bits of each factor) is always taken for rows in half
// precision and never for double.
enum class Products { ieee, split };

// The folded operands of aniso_ext/ops/operands.py. R_in and R_out are R or 2R; both are R for the scalar complement
// alone.
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

template <typename T>
struct DeviceUpdate {
  int32_t width;  // D
  int32_t rank;   // R
  T a_theta;
  T a_rho;
  T a_v;
  bool project;     // take the part of the step in U away again
  const T* basis;   // [D, R]
  const T* shift;   // [D] or null
};

// Rows [N, columns] of any strides, in elements.
template <typename S>
struct DeviceRows {
  const S* data;
  int64_t count;
  int64_t row_stride;
  int64_t column_stride;
};

// Memory that belongs to one launch, aligned to 16 bytes.
struct Workspace {
  void* data;
  int64_t bytes;
};

// Bytes for correct, correct_backward, encode and decode; decode_backward needs twice as many. 0 where rows are kept in
// the result itself.
template <typename S>
cudaError_t rows_workspace(int64_t rows, int32_t width, int64_t* bytes);
// Bytes for correct_sums.
template <typename S>
cudaError_t sums_workspace(int64_t rows, int32_t width, int64_t* bytes);

// out [N, D]
template <typename S, typename T>
cudaError_t launch_correct(const DeviceOperands<T>& operands, const DeviceRows<S>& y, S* out, Products products,
                           Workspace workspace, cudaStream_t stream);

// sums [D]: of e' over all rows, without calibration.
template <typename S, typename T>
cudaError_t launch_correct_sums(const DeviceOperands<T>& operands, const DeviceRows<S>& y, double* sums,
                                Products products, Workspace workspace, cudaStream_t stream);

// grad, y [N, D] -> grad_y [N, D]
template <typename S, typename T>
cudaError_t launch_correct_backward(const DeviceOperands<T>& operands, const DeviceRows<S>& grad,
                                    const DeviceRows<S>& y, S* grad_y, Products products, Workspace workspace,
                                    cudaStream_t stream);

// out [N, 3M + D]
template <typename S, typename T>
cudaError_t launch_encode(const DeviceOperands<T>& operands, const DeviceRows<S>& y, S* out, Products products,
                          Workspace workspace, cudaStream_t stream);

// grad [N, 3M + D], y [N, D] -> grad_y [N, D]
template <typename S, typename T>
cudaError_t launch_encode_backward(const DeviceOperands<T>& operands, const DeviceRows<S>& grad,
                                   const DeviceRows<S>& y, S* grad_y, Products products, cudaStream_t stream);

// state [N, 3M + D], deltas [N, R + D] -> out [N, D]
template <typename S, typename T>
cudaError_t launch_decode(const DeviceUpdate<T>& update, const DeviceRows<S>& state, const DeviceRows<S>& deltas,
                          S* out, Products products, Workspace workspace, cudaStream_t stream);

// grad [N, D] -> grad_state [N, 3M + D], grad_deltas [N, R + D]
template <typename S, typename T>
cudaError_t launch_decode_backward(const DeviceUpdate<T>& update, const DeviceRows<S>& grad,
                                   const DeviceRows<S>& state, const DeviceRows<S>& deltas, S* grad_state,
                                   S* grad_deltas, Products products, Workspace workspace, cudaStream_t stream);

}  // namespace aniso
