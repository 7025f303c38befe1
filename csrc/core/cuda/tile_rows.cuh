// What the kernels do with a tile of rows between its products: the blocks of an initialisation, the norms of a row and
// their gradient. And how a kernel is launched over tiles.
//
// A thread block takes tiles of up to kTileRows rows, one after the other. Coefficients stay in shared memory; where they
// would not fit, tiles have fewer rows. A row w before its norms are known is kept in the format of sums: in the result
// itself where that has this format, else in a workspace of one tile a block, which stays in L2.
#pragma once

#include <algorithm>
#include <limits>

#include "aniso/block_math.h"
#include "aniso/row_scales.h"
#include "tile_products.cuh"

namespace aniso {
namespace {

// The fixed part of a block's shared memory; the coefficients follow it.
template <typename E>
struct Shared {
  Staging<E> staging;
};

template <typename E>
__device__ __forceinline__ Shared<E>& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Shared<E>*>(bytes);
}

template <typename E>
constexpr ANISO_INLINE int64_t padded(int64_t depth) {
  return (depth + E::kDepth - 1) / E::kDepth * E::kDepth;
}

// Lines for `depth` coefficients of tile_rows rows, all zero: products read them up to padded(depth). `end` moves on.
template <typename E>
__device__ __forceinline__ Lines<E> take_lines(typename E::Sum*& end, int32_t tile_rows, int32_t depth) {
  const Lines<E> lines{end, tile_rows};
  const int64_t elements = E::elements(tile_rows, padded<E>(depth));
  for (int64_t i = thread(); i < elements; i += kThreads) lines.data[i] = 0;
  __syncthreads();
  end += elements;
  return lines;
}

template <typename E>
__device__ __forceinline__ typename E::Sum* coefficient_memory() {
  return reinterpret_cast<typename E::Sum*>(&shared_memory<E>() + 1);
}

// A part of a tile's rows in global memory, as a source of products.
template <typename S>
struct TileRows {
  using T = typename Working<S>::type;
  using Stored = S;
  static constexpr bool kExactHalf = std::is_same_v<S, BFloat16>;
  const S* data;
  int64_t row_stride;
  int64_t column_stride;

  __device__ __forceinline__ TileRows(const DeviceRows<S>& rows, int64_t first_row, int32_t first_column = 0)
      : data(rows.data + first_row * rows.row_stride + first_column * rows.column_stride),
        row_stride(rows.row_stride),
        column_stride(rows.column_stride) {}
  // Whether quads are read at once.
  __device__ __forceinline__ bool whole() const {
    return column_stride == 1 && row_stride % kQuad == 0 && aligned<Quad<S>>(data);
  }
  __device__ __forceinline__ T operator()(int32_t row, int32_t column) const {
    return widen(constant(data + row * row_stride + column * column_stride));
  }
  __device__ __forceinline__ Quad<S> quad(int32_t row, int32_t column, int32_t left, bool whole) const {
    const S* at = data + row * row_stride + column * column_stride;
    Quad<S> stored = {};
    if (whole && left >= kQuad) return constant(reinterpret_cast<const Quad<S>*>(at));
#pragma unroll
    for (int32_t i = 0; i < kQuad; ++i) {
      if (i < left) stored.at[i] = constant(at + i * column_stride);
    }
    return stored;
  }
  __device__ __forceinline__ Quad<T> values(const Quad<S>& stored) const {
    Quad<T> values;
#pragma unroll
    for (int32_t i = 0; i < kQuad; ++i) values.at[i] = widen(stored.at[i]);
    return values;
  }
};

// Where a tile's rows are kept between the steps, in the format of sums; a source of products too.
template <typename T>
struct KeptRows {
  using Stored = T;
  static constexpr bool kExactHalf = false;
  T* data;
  int32_t stride;

  __device__ __forceinline__ bool whole() const { return stride % kQuad == 0 && aligned<Quad<T>>(data); }
  __device__ __forceinline__ T* row(int32_t row) const { return data + int64_t(row) * stride; }
  __device__ __forceinline__ T operator()(int32_t row, int32_t column) const { return data[int64_t(row) * stride + column]; }
  __device__ __forceinline__ Quad<T> quad(int32_t row, int32_t column, int32_t left, bool whole) const {
    const T* at = data + int64_t(row) * stride + column;
    if (whole && left >= kQuad) return *reinterpret_cast<const Quad<T>*>(at);
    Quad<T> quad = {};
#pragma unroll
    for (int32_t i = 0; i < kQuad; ++i) {
      if (i < left) quad.at[i] = at[i];
    }
    return quad;
  }
  __device__ __forceinline__ Quad<T> values(const Quad<T>& stored) const { return stored; }
  __device__ __forceinline__ void put(int32_t row, int32_t column, int32_t width, Pair<T> pair) const {
    T* at = data + int64_t(row) * stride + column;
    if (stride % 2 == 0 && aligned<Pair<T>>(data) && column + 1 < width) {
      *reinterpret_cast<Pair<T>*>(at) = pair;
    } else {
      at[0] = pair.a;
      if (column + 1 < width) at[1] = pair.b;
    }
  }
};

// In the result where that has the format, else in the workspace of this block.
template <typename S, typename T>
__device__ __forceinline__ KeptRows<T> kept_rows(S* result, int32_t stride, T* workspace, int32_t tile_rows, int32_t width) {
  if constexpr (std::is_same_v<S, T>) {
    return {result, stride};
  } else {
    return {workspace + int64_t(fresh(blockIdx.x)) * tile_rows * width, width};
  }
}

// Elements of a result [N, columns].
template <typename S>
__device__ __forceinline__ S* result_row(S* result, int64_t row, int32_t columns) {
  return result + row * columns;
}

struct Tile {
  uint32_t index;
  int32_t tile_rows;
  int32_t rows;  // in this one

  __device__ __forceinline__ int64_t first_row() const { return int64_t(fresh(index)) * tile_rows; }
};

// body(tile) for the tiles of this block.
template <typename Body>
__device__ __forceinline__ void for_each_tile(int64_t count, int32_t tile_rows, const Body& body) {
#pragma unroll 1
  for (uint32_t index = blockIdx.x; int64_t(index) * tile_rows < count; index += gridDim.x) {
    body(Tile{index, tile_rows, int32_t(min(int64_t(tile_rows), count - int64_t(index) * tile_rows))});
  }
}

// Two neighbouring elements of a row of a result whose rows lie `stride` apart.
template <typename S, typename T>
__device__ __forceinline__ void store_pair(S* result, int32_t stride, int32_t row, int32_t column, int32_t width, Pair<T> pair) {
  S* at = result + int64_t(row) * stride + column;
  at[0] = narrow<S>(pair.a);
  if (column + 1 < width) at[1] = narrow<S>(pair.b);
}

// store(row, block, load(row, block)) over all blocks of a tile, a few loads at a time. Neighbouring threads take
// neighbouring rows, so that a warp searches one table, or with kAcross neighbouring blocks, so that it writes
// neighbouring columns.
template <bool kAcross, typename Load, typename Store>
__device__ __forceinline__ void for_each_block(int32_t rows, int32_t blocks, const Load& load, const Store& store) {
  constexpr int32_t kTogether = 2;
  const int32_t along = kAcross ? blocks : rows, count = rows * blocks;
  const auto row_of = [&](int32_t i) { return kAcross ? i / along : i % along; };
  const auto block_of = [&](int32_t i) { return kAcross ? i % along : i / along; };
#pragma unroll 1
  for (int32_t i = fresh_thread(); i < count; i += kTogether * kThreads) {
    decltype(load(0, 0)) values[kTogether];
#pragma unroll
    for (int32_t j = 0; j < kTogether; ++j) {
      const int32_t at = i + j * kThreads < count ? i + j * kThreads : i;  // never what another thread may be storing
      values[j] = load(row_of(at), block_of(at));
    }
#pragma unroll
    for (int32_t j = 0; j < kTogether; ++j) {
      const int32_t at = i + j * kThreads;
      if (at < count) store(row_of(at), block_of(at), values[j]);
    }
  }
}

// One block of one row after the projection.
template <typename T>
struct MappedBlock {
  T centred_a, centred_b;  // c_t
  Polar<T> polar;
  Mapped<T> mapped;
};

template <typename E, typename T>
__device__ __forceinline__ MappedBlock<T> map_block(const DeviceOperands<T>& in, const Lines<E>& projected, int32_t row,
                                                    int32_t block) {
  const int32_t column = 2 * block;
  MappedBlock<T> m;
  m.centred_a = projected.raw(row, column) + constant(in.input_bias + column);
  m.centred_b = projected.raw(row, column + 1) + constant(in.input_bias + column + 1);
  m.polar = to_polar(m.centred_a + constant(in.target_coordinates + column),
                     m.centred_b + constant(in.target_coordinates + column + 1));
  const Segment<T>* segments = in.segments + int64_t(block) * in.pieces;
  const T bucket_scale = T(in.bucket_count) / constant(&segments[in.pieces - 1].start);
  const int32_t bucket = bucket_of(m.polar.radius, bucket_scale, in.bucket_count);
  const int32_t base = constant(in.buckets + int64_t(block) * in.bucket_count + bucket);
  m.mapped = map_radius(segments, base, constant(in.windows + block), m.polar.radius);
  return m;
}

// k of the rebuild for c^ = (a, b) of one block, packed; `projected` may be the same lines.
template <typename E, typename T>
__device__ __forceinline__ void store_coefficients(const DeviceOperands<T>& in, const MappedBlock<T>& m,
                                                   const Lines<E>& projected, const Lines<E>& coefficients, int32_t row,
                                                   int32_t block, T a, T b) {
  const int32_t column = 2 * block;
  if (in.rank_out == in.rank) {
    const T scale = constant(in.scale);
    a -= scale * m.centred_a;
    b -= scale * m.centred_b;
  } else {
    if (in.rank_in != in.rank) {
      a -= projected.raw(row, in.rank + column) + constant(in.input_bias + in.rank + column);
      b -= projected.raw(row, in.rank + column + 1) + constant(in.input_bias + in.rank + column + 1);
    }
    coefficients.put(row, in.rank + column, m.centred_a, m.centred_b);
  }
  coefficients.put(row, column, a, b);
}

// Gradient at the projection from that at k (raw) and what reaches c_t through the block's map; packed. grad_projected
// may be the lines of the projection.
template <typename E, typename T>
__device__ __forceinline__ void store_projected_gradient(const DeviceOperands<T>& in, const Lines<E>& grad_coefficients,
                                                         const Lines<E>& grad_projected, int32_t row, int32_t block,
                                                         T through_a, T through_b) {
  const int32_t column = 2 * block;
  const T grad_a = grad_coefficients.raw(row, column), grad_b = grad_coefficients.raw(row, column + 1);
  if (in.rank_out == in.rank) {
    const T scale = constant(in.scale);
    grad_projected.put(row, column, through_a - scale * grad_a, through_b - scale * grad_b);
    return;
  }
  grad_projected.put(row, column, through_a + grad_coefficients.raw(row, in.rank + column),
                     through_b + grad_coefficients.raw(row, in.rank + column + 1));
  if (in.rank_in != in.rank) grad_projected.put(row, in.rank + column, -grad_a, -grad_b);
}

// lines[row][column] = sum_j source(row, j) weight(column, j); the number of columns is even.
template <Summing kSumming = Summing::kAtOnce, typename E, typename W, typename Source>
__device__ __forceinline__ void project(const Source& source, int32_t rows, const W& weight, Staging<E>& staging,
                                        const Lines<E>& lines) {
  using T = typename E::Sum;
  multiply_rows<E, kSumming>(source, rows, weight, staging, Unchanged{}, [&](int32_t row, int32_t column, Pair<T> sums) {
    lines.raw(row, column) = sums.a;
    lines.raw(row, column + 1) = sums.b;
  });
  __syncthreads();
}

// coefficients := k of `correct`, in place of the projection or not.
template <typename E, typename T>
__device__ __forceinline__ void map_blocks(const DeviceOperands<T>& in, int32_t rows, const Lines<E>& projected,
                                           const Lines<E>& coefficients) {
  for_each_block<false>(
      rows, in.rank / 2, [&](int32_t row, int32_t block) { return map_block(in, projected, row, block); },
      [&](int32_t row, int32_t block, const MappedBlock<T>& m) {
        store_coefficients(in, m, projected, coefficients, row, block, m.mapped.radius * m.polar.cos,
                           m.mapped.radius * m.polar.sin);
      });
  __syncthreads();
}

// kept = coefficients times weights.
template <typename E, typename W, typename T>
__device__ __forceinline__ void rebuild(const Lines<E>& coefficients, int32_t rows, const W& weight, Staging<E>& staging,
                                        const KeptRows<T>& kept) {
  multiply_lines<E>(coefficients, rows, weight, staging, Unchanged{},
                    [&](int32_t row, int32_t column, Pair<T> sums) { kept.put(row, column, weight.columns, sums); });
  __syncthreads();
}

// (row, column, rebuilt) -> w of an initialisation.
template <typename S, typename T>
struct InitialRow {
  const DeviceOperands<T>& in;
  const TileRows<S>& y;

  __device__ __forceinline__ T operator()(int32_t row, int32_t column, T rebuilt) const {
    return rebuilt + constant(in.scale + column * in.scale_stride) * y(row, column) + constant(in.offset + column);
  }
};

template <typename T>
__device__ __forceinline__ T sum_over_warp(T value) {
#pragma unroll
  for (int32_t step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// One warp a row: body(row) for the rows of this warp.
template <typename Body>
__device__ __forceinline__ void for_each_row(int32_t rows, const Body& body) {
  for (int32_t row = fresh_thread() / kWarp; row < rows; row += kWarps) body(row);
}
template <typename Body>
__device__ __forceinline__ void for_each_column(int32_t width, const Body& body) {
#pragma unroll 4
  for (int32_t column = fresh_thread() % kWarp; column < width; column += kWarp) body(column);
}

// store(j, load(j)) over the columns of a row, several loads before their stores.
template <int32_t kTogether = 4, typename Load, typename Store>
__device__ __forceinline__ void transform_columns(int32_t width, const Load& load, const Store& store) {
  for (int32_t first = fresh_thread() % kWarp; first < width; first += kTogether * kWarp) {
    decltype(load(0)) values[kTogether];
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      if (first + i * kWarp < width) values[i] = load(first + i * kWarp);
    }
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      if (first + i * kWarp < width) store(first + i * kWarp, values[i]);
    }
  }
}

// Scales of the row that `load` gives, column by column.
template <typename T, typename Load>
__device__ __forceinline__ RowScales<T> scales_of(int32_t width, const T* shift, const Load& load) {
  T squares = T(0), dot_shift = T(0), shift_squares = T(0);
  for_each_column(width, [&](int32_t j) {
    const T value = load(j), g = shift ? constant(shift + j) : T(0);
    squares += value * value;
    dot_shift += value * g;
    shift_squares += g * g;
  });
  return row_scales(sum_over_warp(squares), sum_over_warp(dot_shift), sum_over_warp(shift_squares), shift != nullptr);
}

// result [rows, D] = w normalised, calibrated and normalised again, with w = complete(row, column, kept).
template <typename S, typename T, typename Complete>
__device__ __forceinline__ void finish_rows(const KeptRows<T>& kept, const Complete& complete, int32_t rows,
                                            int32_t width, const T* shift, S* result) {
  for_each_row(rows, [&](int32_t row) {
    const T* rebuilt = kept.row(row);
    const auto w = [&](int32_t j) { return complete(row, j, rebuilt[j]); };
    const RowScales<T> scales = scales_of(width, shift, w);
    S* out = result + int64_t(row) * width;
    transform_columns(
        width, [&](int32_t j) { return (w(j) * scales.inverse + (shift ? constant(shift + j) : T(0))) * scales.outer; },
        [&](int32_t j, T value) { out[j] = narrow<S>(value); });
  });
  __syncthreads();
}

// result [rows, D], rows `stride` apart, = complete(row, column, kept).
template <typename S, typename T, typename Complete>
__device__ __forceinline__ void store_rows(const KeptRows<T>& kept, const Complete& complete, int32_t rows,
                                           int32_t width, S* result, int32_t stride) {
  for_each_row(rows, [&](int32_t row) {
    const T* values = kept.row(row);
    S* out = result + int64_t(row) * stride;
    transform_columns(width, [&](int32_t j) { return complete(row, j, values[j]); },
                      [&](int32_t j, T value) { out[j] = narrow<S>(value); });
  });
  __syncthreads();
}

// kept = gradient at w from that at e, with w = complete(row, column, kept).
template <typename S, typename T, typename Complete>
__device__ __forceinline__ void finish_backward(const KeptRows<T>& kept, const Complete& complete,
                                                const TileRows<S>& grad, int32_t rows, int32_t width,
                                                const T* shift) {
  for_each_row(rows, [&](int32_t row) {
    T* w = kept.row(row);
    T squares = T(0), dot_shift = T(0), shift_squares = T(0), dot_grad = T(0), grad_shift = T(0);
    transform_columns<2>(  // pairs
        width, [&](int32_t j) { return Pair<T>{complete(row, j, w[j]), grad(row, j)}; },
        [&](int32_t j, Pair<T> pair) {
          w[j] = pair.a;
          squares += pair.a * pair.a;
          dot_grad += pair.a * pair.b;
          const T g = shift ? constant(shift + j) : T(0);
          dot_shift += pair.a * g;
          shift_squares += g * g;
          grad_shift += pair.b * g;
        });
    const RowScales<T> scales =
        row_scales(sum_over_warp(squares), sum_over_warp(dot_shift), sum_over_warp(shift_squares), shift != nullptr);
    const RowGradient<T> g =
        row_gradient(scales, sum_over_warp(dot_grad), sum_over_warp(grad_shift), shift != nullptr);
    transform_columns(
        width,
        [&](int32_t j) {
          const T value = g.grad * grad(row, j) - g.row * w[j];
          return shift ? value - g.shift * constant(shift + j) : value;
        },
        [&](int32_t j, T value) { w[j] = value; });
  });
  __syncthreads();
}

struct Plan {
  int32_t tile_rows;
  int32_t grid;
  size_t shared_bytes;
};

inline cudaError_t attribute(cudaDeviceAttr which, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, which, device) : error;
}

// The most blocks that any launch has, and the rows that they hold.
constexpr int64_t kMostBlocksPerProcessor = 2;
inline cudaError_t rows_in_flight(int64_t rows, int64_t* blocks, int64_t* in_flight) {
  int processors = 0;
  const cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, &processors);
  *blocks = std::max<int64_t>(1, processors * kMostBlocksPerProcessor);
  *in_flight = std::min((rows + kTileRows - 1) / kTileRows, *blocks) * kTileRows;
  return error;
}

// Tile, grid and shared memory of a kernel over `count` > 0 rows; `columns` is the sum of padded coefficients a row, and
// row_bytes what a row takes from a workspace of workspace_bytes.
template <typename E, typename Kernel>
cudaError_t plan_launch(Kernel kernel, int64_t count, int64_t columns, int64_t row_bytes, int64_t workspace_bytes, Plan* plan) {
  static_assert(E::kBlocksPerProcessor <= kMostBlocksPerProcessor, "the workspace has room for fewer blocks");
  int limit = 0, processors = 0, blocks = 0;
  cudaError_t error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limit);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error != cudaSuccess) return error;
  const auto bytes = [&](int32_t tile_rows) {
    return int64_t(sizeof(Shared<E>)) + E::elements(tile_rows, columns) * int64_t(sizeof(typename E::Sum));
  };
  int32_t tile_rows = kTileRows;
  while (tile_rows > E::kSmallestTile && bytes(tile_rows) > limit) tile_rows /= 2;
  if (bytes(tile_rows) > limit) return cudaErrorInvalidValue;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes(tile_rows)));
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, size_t(bytes(tile_rows)));
  if (error != cudaSuccess) return error;
  const int64_t tiles = (count + tile_rows - 1) / tile_rows;
  int64_t grid = std::min(tiles, int64_t(processors) * std::clamp(blocks, 1, E::kBlocksPerProcessor));
  if (row_bytes > 0) grid = std::min(grid, workspace_bytes / (tile_rows * row_bytes));
  if (grid < 1 || tiles > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  *plan = {tile_rows, int32_t(grid), size_t(bytes(tile_rows))};
  return cudaSuccess;
}

template <typename T>
bool valid(const DeviceOperands<T>& in) {
  constexpr int32_t kLimit = std::numeric_limits<int32_t>::max() / 4;
  const bool ranks = in.rank >= 2 && in.rank % 2 == 0 && in.rank <= kLimit &&
                     (in.rank_in == in.rank || in.rank_in == 2 * in.rank) &&
                     (in.rank_out == in.rank || in.rank_out == 2 * in.rank) && in.rank_in <= in.rank_out;
  const bool sizes = in.width >= 1 && in.width <= kLimit && in.pieces >= 3 && in.bucket_count >= 1;
  return ranks && sizes && (in.scale_stride == 0 || in.scale_stride == 1) && in.input_weight && in.input_bias &&
         in.target_coordinates && in.segments && in.buckets && in.windows && in.output_weight && in.scale && in.offset;
}

template <typename S>
bool same_rows(const DeviceRows<S>& a, const DeviceRows<S>& b) {
  return a.count >= 0 && a.count == b.count;
}

template <typename T>
bool valid(const DeviceUpdate<T>& in) {
  constexpr int32_t kLimit = std::numeric_limits<int32_t>::max() / 4;
  return in.rank >= 2 && in.rank % 2 == 0 && in.rank <= kLimit && in.width >= 1 && in.width <= kLimit && in.basis;
}

// What a row takes of the workspace where it cannot be kept in the result.
template <typename S>
constexpr int64_t kept_bytes(int32_t width) {
  using T = typename Working<S>::type;
  return std::is_same_v<S, T> ? 0 : int64_t(width) * int64_t(sizeof(T));
}

// run(engine) with the engine for rows of format S. Coefficients too many for the tiles of Split leave room for the
// smaller ones of Exact.
template <typename S, typename Run>
cudaError_t with_engine(Products products, const Run& run) {
  if constexpr (std::is_same_v<S, double>) {
    return run(Exact<double>{});
  } else {
    if (products == Products::split || !std::is_same_v<S, float>) {
      const cudaError_t error = run(Split{});
      if (error != cudaErrorInvalidValue) return error;
    }
    return run(Exact<float>{});
  }
}

}  // namespace
}  // namespace aniso
