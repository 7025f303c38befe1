// Launchers for Hopper (compute capability 9.0): half-precision rows of width up to 1280, a multiple of 8, and rank up to 128. For a scalar
// complement, sm90_correct also takes float32 rows, and half-precision rows of width up to 4096 and rank up to 256.
// csrc/core/cuda/sm90_team.cuh, sm90_forms.cuh and sm90_stream.cuh say how they work. They never wait for the device and allocate nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "aniso/block_math.h"
#include "aniso/storage.h"

namespace aniso {

constexpr int32_t kSm90Width = 1280;
constexpr int32_t kSm90Rank = 128;
constexpr int32_t kSm90StreamWidth = 4096;
constexpr int32_t kSm90StreamRank = 256;
constexpr int32_t kSm90SumColumns = kSm90Rank + 1;  // of a slot of partial sums, after those of the D columns

// Whether Q is too large to stay in the shared memory of a cluster, and streams.
constexpr bool sm90_streams(int32_t width, int32_t rank) { return width > kSm90Width || rank > kSm90Rank; }

// The columns of Q that kernels read, those past R zero.
constexpr int32_t sm90_columns(int32_t rank) { return rank <= kSm90Rank ? kSm90Rank : kSm90StreamRank; }

// Constants of the closed form. Q^T Q = I up to the rounding of S, as the norms of a scalar complement rely on it; all pointers are device pointers, matrices row-major.
template <typename S>
struct Sm90Operands {
  int32_t width;                   // D
  int32_t rank;                    // R
  int32_t cell_count;              // G
  bool diagonal;                   // scale has D values, else one
  const S* basis;                  // [D, sm90_columns(R)], zero past R
  const S* shuffled;               // the same as in Sm90Update; where Q streams, [sm90_padded(D), sm90_columns(R)] with only its rows reordered
  const float* input_bias;         // [R]
  const float* target_coordinates; // [R]
  const float* offset_coordinates; // [R], Q^T offset, for a scalar complement
  const float* shift_coordinates;  // [R], Q^T shift, for a scalar complement and a shift
  // The radius map in cell i = min(int(rho cell_scale), G) is rho last_slope + unit (start + rise (rho cell_scale - i)).
  const uint32_t* cells;           // [sm90_columns(R) / 2, G + 1], start and rise as two fp16 numbers, the last cell and all past M zero;
                                   // NaN where one line is too coarse: there the map itself is searched. Where Q streams, at a multiple
                                   // of 16 bytes, and G + 1 a power of two from 64 to 2048
  const float* map_scales;         // [3, sm90_columns(R) / 2], cell_scale, last_slope and unit of each block, zero past M
  int32_t pieces;                  // K + 1
  int32_t bucket_count;
  const Segment<float>* segments;  // [M, K + 1]
  const int16_t* buckets;          // [M, bucket_count]
  const int32_t* windows;          // [M]
  const float* scale;              // [1] or [D]
  const float* offset;             // [D]
  const float* shift;              // [D] or null
};

// Rows [N, D] whose elements are contiguous; they begin, and follow each other, at multiples of 16 bytes.
template <typename S>
struct Sm90Rows {
  const S* data;
  int64_t count;
  int64_t stride;  // elements from one row to the next
};

// Whether the current device is one that these kernels are for. Launchers return cudaErrorInvalidValue for a width or a rank
// that they have no kernel for.
bool sm90_present();

// out [N, D], contiguous.
template <typename S>
cudaError_t sm90_correct(const Sm90Operands<S>& operands, const Sm90Rows<S>& y, S* out, cudaStream_t stream);

// The same of float32 rows of a width that is a multiple of 4, by products of fp16, which keeps as many bits as TF32: scalar complement.
// Both norms are summed from the rows, whatever Q^T Q. `shuffled` has the columns of Q in groups of 32 as in Sm90Update, but its rows in
// groups of 16: 2 (2 quarter + pair) + side of a group comes at 2 (4 pair + quarter) + side, for pair 0 and 1 and quarter from 0 to 3.
cudaError_t sm90_correct(const Sm90Operands<Float16>& operands, const Sm90Rows<float>& y, float* out, cudaStream_t stream);

// sums [D]: of e' over all rows, at least one, without calibration. Scalar complement. `partial` is memory for the launch,
// [sm90_sum_slots(D), D + kSm90SumColumns]; everything is added up in a fixed order.
template <typename S>
cudaError_t sm90_correct_sums(const Sm90Operands<S>& operands, const Sm90Rows<S>& y, float* partial, double* sums,
                              cudaStream_t stream);
int32_t sm90_sum_slots(int32_t width);

// state [N, 3M + D], contiguous, 3M and D multiples of 8. Scalar complement.
template <typename S>
cudaError_t sm90_encode(const Sm90Operands<S>& operands, const Sm90Rows<S>& y, S* state, cudaStream_t stream);

// grad_y [N, D], contiguous, of y [N, D] from grad [N, D]. Scalar complement.
template <typename S>
cudaError_t sm90_correct_backward(const Sm90Operands<S>& operands, const Sm90Rows<S>& grad, const Sm90Rows<S>& y, S* grad_y,
                                  cudaStream_t stream);

// grad_y [N, D], contiguous, of y [N, D] from grad [N, 3M + D]; limits as for the state. Only bfloat16: gradients of phases enlarge what a
// basis that is rounded to the format of the rows leaves of a coordinate, more than gradients of float16 rows may be off.
template <typename S>
cudaError_t sm90_encode_backward(const Sm90Operands<S>& operands, const Sm90Rows<S>& grad, const Sm90Rows<S>& y, S* grad_y,
                                 cudaStream_t stream);

// Constants of the bounded update. `shuffled` has the columns of Q in groups of 32, and its rows too, each in the order that lets a
// thread hold neighbours: 2 (4 quarter + pair) + side of a group comes at 2 (4 pair + quarter) + side, for pair and quarter from 0 to 3.
template <typename S>
struct Sm90Update {
  int32_t width;      // D, a multiple of 8
  int32_t rank;       // R, a multiple of 16
  float a_theta, a_rho, a_v;
  bool project;
  const S* shuffled;   // [sm90_padded(D), kSm90Rank], zero past D and past R
  const float* shift;  // [D] or null
};

// The rows of a shuffled basis: whole chunks of columns.
constexpr int32_t sm90_padded(int32_t width) { return (width + 63) / 64 * 64; }

// out [N, D], contiguous, of state [N, 3M + D] and deltas [N, R + D].
template <typename S>
cudaError_t sm90_decode(const Sm90Update<S>& update, const Sm90Rows<S>& state, const Sm90Rows<S>& deltas, S* out,
                        cudaStream_t stream);

// grad_state [N, 3M + D] and grad_deltas [N, R + D], contiguous, from grad [N, D].
template <typename S>
cudaError_t sm90_decode_backward(const Sm90Update<S>& update, const Sm90Rows<S>& grad, const Sm90Rows<S>& state,
                                 const Sm90Rows<S>& deltas, S* grad_state, S* grad_deltas, cudaStream_t stream);

}  // namespace aniso
