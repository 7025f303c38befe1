// Closed-form correction of source rows, one kernel for any architecture from sm_80 on (METHOD section 4).
//
//   p = W_in y + bias             k = coefficients of the mapped blocks (store_coefficients)
//   w = W_out k + scale * y + offset      e' = w/max(|w|, floor)      e = Norm(e' + shift)
//
// Shapes   y, out [N, D]; W_in [R_in, D]; W_out [D, R_out]; segments [M, K + 1]; buckets [M, G]. Any N, D, R and K.
// Grid     one block of 256 threads per tile of up to 32 rows, x dimension; in a full grid a block takes several tiles.
// Shared   the tile's coefficients, 32 x max(R_in, R_out) sums (fewer rows where that does not fit), and two staging
//          buffers of 32 x 32 rows and 64 x 32 weights in the format of sums.
// Registers  8 sums of a 2 x 4 patch of the product; the row sums of two rows.
// Global   y is read once per 64 columns of R_in and twice more (norms, output), mostly from L2; the weights stream
//          from L2 once (W_in) and twice (W_out) per tile. From memory: 2 D storage values per row.
// FLOP     2 D (R_in + 2 R_out) per row: the rebuild runs twice, once for the norms and once for the output. So no row
//          needs D values of shared memory, and no unnormalised row is rounded to the storage format.
#include <algorithm>
#include <limits>

#include "aniso/block_math.h"
#include "aniso/cuda.h"
#include "aniso/row_scales.h"

namespace aniso {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kBlocksPerProcessor = 2;  // leaves 128 registers a thread, so that nothing spills
constexpr int32_t kTileRows = 32;
constexpr int32_t kTileColumns = 64;
constexpr int32_t kTileDepth = 32;
constexpr int32_t kLanes = 16;                                    // threads that share a row
constexpr int32_t kThreadRows = kTileRows / (kThreads / kLanes);  // 2
constexpr int32_t kThreadColumns = kTileColumns / kLanes;         // 4
constexpr int32_t kPitch = kTileDepth + 1;                        // odd: a column of the buffer spreads over all banks

template <typename T>
struct Staging {
  T rows[kTileRows * kPitch];
  T weights[kTileColumns * kPitch];
};

template <typename T>
struct Patch {
  T sum[kThreadRows][kThreadColumns];
};

__device__ __forceinline__ int32_t thread_lane() { return int32_t(threadIdx.x) % kLanes; }
__device__ __forceinline__ int32_t thread_row(int32_t i) { return int32_t(threadIdx.x) / kLanes * kThreadRows + i; }

// weights[column][depth] = weight[first_column + column][first_depth + depth], zero outside the matrix.
template <typename P, typename T>
__device__ void stage_weights(const P* weight, int32_t columns, int32_t depth, int32_t first_column,
                              int32_t first_depth, Staging<T>& staging) {
  for (int32_t i = threadIdx.x; i < kTileColumns * kTileDepth; i += kThreads) {
    const int32_t column = i / kTileDepth, at = i % kTileDepth;
    const bool inside = first_column + column < columns && first_depth + at < depth;
    staging.weights[column * kPitch + at] =
        inside ? widen(weight[int64_t(first_column + column) * depth + first_depth + at]) : T(0);
  }
}

template <typename S, typename T>
__device__ void stage_rows(const DeviceRows<S>& y, int32_t width, int64_t first_row, int32_t rows, int32_t first_depth,
                           Staging<T>& staging) {
  for (int32_t i = threadIdx.x; i < kTileRows * kTileDepth; i += kThreads) {
    const int32_t row = i / kTileDepth, column = first_depth + i % kTileDepth;
    const bool inside = row < rows && column < width;
    staging.rows[row * kPitch + i % kTileDepth] =
        inside ? widen(y.data[(first_row + row) * y.row_stride + column * y.column_stride]) : T(0);
  }
}

// patch += rows x weights^T over `depth` columns; rows[i] is where row thread_row(i) begins.
template <typename T>
__device__ __forceinline__ void multiply(const T* const (&rows)[kThreadRows], const T* weights, int32_t depth,
                                         Patch<T>& patch) {
#pragma unroll 4
  for (int32_t at = 0; at < depth; ++at) {
    T weight[kThreadColumns];
#pragma unroll
    for (int32_t c = 0; c < kThreadColumns; ++c) weight[c] = weights[(thread_lane() + c * kLanes) * kPitch + at];
#pragma unroll
    for (int32_t r = 0; r < kThreadRows; ++r) {
      const T value = rows[r][at];
#pragma unroll
      for (int32_t c = 0; c < kThreadColumns; ++c) patch.sum[r][c] += value * weight[c];
    }
  }
}

// coefficients[row][r] = (W_in y)_r + bias_r for every row of the tile; rows past the end count as zero rows.
template <typename S, typename P, typename T>
__device__ void project(const DeviceOperands<P>& in, const DeviceRows<S>& y, int64_t first_row, int32_t rows,
                        int32_t tile_rows, int32_t pitch, Staging<T>& staging, T* coefficients) {
  const T* const staged[kThreadRows] = {staging.rows + thread_row(0) * kPitch, staging.rows + thread_row(1) * kPitch};
  for (int32_t first_column = 0; first_column < in.rank_in; first_column += kTileColumns) {
    Patch<T> patch = {};
    for (int32_t depth = 0; depth < in.width; depth += kTileDepth) {
      stage_rows(y, in.width, first_row, rows, depth, staging);
      stage_weights(in.input_weight, in.rank_in, in.width, first_column, depth, staging);
      __syncthreads();
      multiply(staged, staging.weights, kTileDepth, patch);
      __syncthreads();
    }
#pragma unroll
    for (int32_t r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int32_t c = 0; c < kThreadColumns; ++c) {
        const int32_t column = first_column + thread_lane() + c * kLanes;
        if (thread_row(r) < tile_rows && column < in.rank_in) {
          coefficients[thread_row(r) * pitch + column] = patch.sum[r][c] + in.input_bias[column];
        }
      }
    }
  }
}

// Projections become the coefficients k of the rebuild, in place: a thread reads and writes the columns of one block of
// one row. Neighbouring threads take neighbouring rows of a block, so that a warp searches one table.
template <typename P, typename T>
__device__ void map_blocks(const DeviceOperands<P>& in, int32_t tile_rows, int32_t pitch, T* coefficients) {
  const T scalar = in.scale[0];
  for (int32_t i = threadIdx.x; i < tile_rows * (in.rank / 2); i += kThreads) {
    const int32_t block = i / tile_rows, column = 2 * block;
    T* row = coefficients + (i % tile_rows) * pitch;
    const T centred_a = row[column], centred_b = row[column + 1];
    const Polar<T> polar =
        to_polar(centred_a + in.target_coordinates[column], centred_b + in.target_coordinates[column + 1]);
    const Segment<T>* segments = in.segments + int64_t(block) * in.pieces;
    const int32_t bucket = bucket_of(polar.radius, T(in.bucket_count) / segments[in.pieces - 1].start, in.bucket_count);
    const int32_t base = in.buckets[int64_t(block) * in.bucket_count + bucket];
    const T radius = map_radius(segments, base, in.windows[block], polar.radius).radius;
    T a = radius * polar.cos, b = radius * polar.sin;
    if (in.rank_out == in.rank) {
      a -= scalar * centred_a;
      b -= scalar * centred_b;
    } else {
      if (in.rank_in != in.rank) {
        a -= row[in.rank + column];
        b -= row[in.rank + column + 1];
      }
      row[in.rank + column] = centred_a;
      row[in.rank + column + 1] = centred_b;
    }
    row[column] = a;
    row[column + 1] = b;
  }
}

// body(r, column, w) for every element of the tile's unnormalised rows, always in the same order of sums.
template <typename S, typename P, typename T, typename Body>
__device__ __forceinline__ void for_each_rebuilt(const DeviceOperands<P>& in, const DeviceRows<S>& y, int64_t first_row,
                                                 int32_t rows, int32_t tile_rows, int32_t pitch, Staging<T>& staging,
                                                 const T* coefficients, const Body& body) {
  // Rows past the tile reread its last one; their results are not used.
  const int32_t last = tile_rows - 1;
  for (int32_t first_column = 0; first_column < in.width; first_column += kTileColumns) {
    Patch<T> patch = {};
    for (int32_t depth = 0; depth < in.rank_out; depth += kTileDepth) {
      stage_weights(in.output_weight, in.width, in.rank_out, first_column, depth, staging);
      __syncthreads();
      const T* const part[kThreadRows] = {coefficients + min(thread_row(0), last) * pitch + depth,
                                          coefficients + min(thread_row(1), last) * pitch + depth};
      multiply(part, staging.weights, min(kTileDepth, in.rank_out - depth), patch);
      __syncthreads();
    }
#pragma unroll
    for (int32_t r = 0; r < kThreadRows; ++r) {
      if (thread_row(r) >= rows) continue;
      const S* row = y.data + (first_row + thread_row(r)) * y.row_stride;
#pragma unroll
      for (int32_t c = 0; c < kThreadColumns; ++c) {
        const int32_t column = first_column + thread_lane() + c * kLanes;
        if (column >= in.width) continue;
        const T scale = in.scale[column * in.scale_stride];
        body(r, column, patch.sum[r][c] + scale * widen(row[column * y.column_stride]) + in.offset[column]);
      }
    }
  }
}

// Sum over the threads that share a row; every one of them gets it.
template <typename T>
__device__ __forceinline__ T sum_over_lanes(T value) {
#pragma unroll
  for (int32_t step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <typename S, typename P>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    correct_kernel(const DeviceOperands<P> in, const DeviceRows<S> y, const int32_t tile_rows, const int32_t pitch,
                   S* __restrict__ out) {
  using T = typename Working<P>::type;
  extern __shared__ __align__(16) unsigned char shared[];
  Staging<T>& staging = *reinterpret_cast<Staging<T>*>(shared);
  T* coefficients = reinterpret_cast<T*>(shared + sizeof(Staging<T>));
  const bool shifted = in.shift != nullptr;

  T shift_squares = T(0);
  if (shifted) {
    for (int32_t j = thread_lane(); j < in.width; j += kLanes) shift_squares += in.shift[j] * in.shift[j];
    shift_squares = sum_over_lanes(shift_squares);
  }

  const int64_t tiles = (y.count + tile_rows - 1) / tile_rows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = tile * tile_rows;
    const int32_t rows = int32_t(min(int64_t(tile_rows), y.count - first_row));

    project(in, y, first_row, rows, tile_rows, pitch, staging, coefficients);
    __syncthreads();
    map_blocks(in, tile_rows, pitch, coefficients);
    __syncthreads();

    T squares[kThreadRows] = {}, dot_shift[kThreadRows] = {};
    for_each_rebuilt(in, y, first_row, rows, tile_rows, pitch, staging, coefficients,
                     [&](int32_t r, int32_t column, T w) {
                       squares[r] += w * w;
                       if (shifted) dot_shift[r] += w * in.shift[column];
                     });
    RowScales<T> scales[kThreadRows];
#pragma unroll
    for (int32_t r = 0; r < kThreadRows; ++r) {
      scales[r] = row_scales(sum_over_lanes(squares[r]), sum_over_lanes(dot_shift[r]), shift_squares, shifted);
    }

    for_each_rebuilt(in, y, first_row, rows, tile_rows, pitch, staging, coefficients,
                     [&](int32_t r, int32_t column, T w) {
                       const T value = (w * scales[r].inverse + (shifted ? in.shift[column] : T(0))) * scales[r].outer;
                       out[(first_row + thread_row(r)) * in.width + column] = narrow<S>(value);
                     });
    __syncthreads();  // the next tile overwrites the coefficients
  }
}

template <typename P>
bool valid(const DeviceOperands<P>& in) {
  const bool ranks = in.rank >= 2 && in.rank % 2 == 0 && in.rank <= std::numeric_limits<int32_t>::max() / 2 &&
                     (in.rank_in == in.rank || in.rank_in == 2 * in.rank) &&
                     (in.rank_out == in.rank || in.rank_out == 2 * in.rank) && in.rank_in <= in.rank_out;
  const bool sizes = in.width >= 1 && in.width <= std::numeric_limits<int32_t>::max() - kTileColumns &&
                     in.pieces >= 3 && in.bucket_count >= 1;
  return ranks && sizes && (in.scale_stride == 0 || in.scale_stride == 1) && in.input_weight && in.input_bias &&
         in.target_coordinates && in.segments && in.buckets && in.windows && in.output_weight && in.scale && in.offset;
}

}  // namespace

template <typename S, typename P>
cudaError_t launch_correct(const DeviceOperands<P>& operands, const DeviceRows<S>& y, S* out, cudaStream_t stream) {
  using T = typename Working<P>::type;
  if (!valid(operands) || y.count < 0) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  if (y.data == nullptr || out == nullptr) return cudaErrorInvalidValue;

  int device = 0, shared_limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;

  const int32_t pitch = operands.rank_out | 1;  // odd, as kPitch
  const int64_t row_bytes = int64_t(pitch) * int64_t(sizeof(T)), staging_bytes = sizeof(Staging<T>);
  int32_t tile_rows = kTileRows;
  while (tile_rows > 1 && staging_bytes + tile_rows * row_bytes > shared_limit) tile_rows /= 2;
  const int64_t shared_bytes = staging_bytes + tile_rows * row_bytes;
  if (shared_bytes > shared_limit) return cudaErrorInvalidValue;
  error = cudaFuncSetAttribute(correct_kernel<S, P>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess) return error;

  const int64_t tiles = (y.count + tile_rows - 1) / tile_rows;
  const int64_t grid = std::min<int64_t>(tiles, std::numeric_limits<int32_t>::max());
  correct_kernel<S, P>
      <<<dim3(uint32_t(grid)), kThreads, size_t(shared_bytes), stream>>>(operands, y, tile_rows, pitch, out);
  return cudaGetLastError();
}

#define ANISO_INSTANTIATE(S, P) \
  template cudaError_t launch_correct<S, P>(const DeviceOperands<P>&, const DeviceRows<S>&, S*, cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
ANISO_INSTANTIATE(BFloat16, BFloat16)
#undef ANISO_INSTANTIATE

}  // namespace aniso
