// Products of a tile of rows with a matrix of weights, for every kernel of the portable path (sm_80 and newer).
//
//   sums[row][column] = sum_k rows[row][k] * weight(column, k)        64 rows x 128 columns a block, kDepth at a time
//
// Two engines with one interface:
//   Exact<T>  fused multiply-adds in T on the ordinary cores, 4 x 8 sums a thread. IEEE float and double.
//   Split     bf16 tensor cores (mma.sync m16n8k16) with float factors x = high + low, high the upper 16 bits of x and
//             low = bf16(x - high): x y = high high' + high low' + low high' up to 2^-16 |x y|. Half-precision rows are held
//             exactly, float ones to 16 bits, which is more than tf32 keeps and has the range of float.
//
// Operands lie in shared memory in the engine's layout, such that the reads of a warp hit every bank once:
//   Exact  value(line, k) at k (lines + 4) + line: a thread reads the values of 4 neighbouring lines at once.
//   Split  slabs of 16 k. 16 bytes hold what a thread passes to mma.sync in one operand: of rows r and r + 8 two pairs
//          (k, k + 1) of high parts, or of low parts; of a column both. Which pairs share an operand does not matter as
//          long as rows and columns agree. Until a pair of a row is packed, its two words hold the floats themselves.
#pragma once

#include <cstdint>
#include <type_traits>

#include "aniso/config.h"
#include "aniso/cuda.h"
#include "aniso/storage.h"

namespace aniso {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kTileRows = 64;
constexpr int32_t kTileColumns = 128;
constexpr int32_t kWarp = 32;
constexpr int32_t kWarps = kThreads / kWarp;
constexpr int32_t kQuad = 4;  // neighbouring k that a thread carries to shared memory

__device__ __forceinline__ int32_t thread() {
  __builtin_assume(threadIdx.x < kThreads);  // so that its quotients are shifts
  return int32_t(threadIdx.x);
}

// The same value, but what follows from it is computed anew: a kernel of many steps would run out of registers if it kept
// every address from one step to the next.
__device__ __forceinline__ uint32_t fresh(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int32_t fresh_thread() {
  int32_t self;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(self));
  __builtin_assume(self >= 0 && self < kThreads);
  return self;
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T a, b;
};

// Four values in memory, read or written at once where they are aligned.
template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
  T at[kQuad];
};

template <typename T>
__device__ __forceinline__ bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(T) == 0;
}

// What no kernel of a launch writes. Such loads may pass stores, so that many are under way at a time.
template <typename T>
__device__ __forceinline__ T constant(const T* at) {
  if constexpr (std::is_arithmetic_v<T>) {
    return __ldg(at);
  } else {
    return {__ldg(&at->bits)};
  }
}
template <typename T>
__device__ __forceinline__ Quad<T> constant(const Quad<T>* at) {
  using Words = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  constexpr int32_t kWords = sizeof(Quad<T>) / sizeof(Words);
  struct Raw {
    Words at[kWords];
  } raw;
#pragma unroll
  for (int32_t i = 0; i < kWords; ++i) raw.at[i] = __ldg(reinterpret_cast<const Words*>(at) + i);
  return bit_cast<Quad<T>>(raw);
}

template <typename T>
struct Exact {
  using Sum = T;
  static constexpr int32_t kDepth = 16;
  static constexpr int32_t kSmallestTile = 4;
  static constexpr int32_t kBlocksPerProcessor = sizeof(T) == 8 ? 1 : 2;  // registers enough that nothing spills
  static constexpr int32_t kTransposedLanes = 32;  // neighbouring threads that carry neighbouring columns
  static constexpr int32_t kRows = 4, kHalfColumns = 4, kLanes = 16;

  struct Sums {
    T at[kRows][2 * kHalfColumns];

    __device__ __forceinline__ void operator+=(const Sums& other) {
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
        for (int32_t j = 0; j < 2 * kHalfColumns; ++j) at[i][j] += other.at[i][j];
      }
    }
  };

  static constexpr ANISO_INLINE int64_t elements(int64_t lines, int64_t depth) { return depth * (lines + 4); }
  static __device__ __forceinline__ int32_t row_index(int32_t line, int32_t k, int32_t lines) {
    return k * (lines + 4) + line;
  }
  static __device__ __forceinline__ void put_row(T* data, int32_t line, int32_t k, int32_t lines, T a, T b) {
    data[row_index(line, k, lines)] = a;
    data[row_index(line, k + 1, lines)] = b;
  }
  static __device__ __forceinline__ void put_column(T* data, int32_t line, int32_t k, const Quad<T>& quad) {
#pragma unroll
    for (int32_t i = 0; i < kQuad; ++i) data[row_index(line, k + i, kTileColumns)] = quad.at[i];
  }

  // kDepth steps. Where row_lines is not all of a tile's, rows past the last read it again; their sums are not used.
  template <bool kLowRows, bool kAllRows>
  static __device__ __forceinline__ void multiply(int32_t self, const T* rows, int32_t row_lines, const T* columns, Sums& sums) {
    const int32_t first_row = self / kLanes * kRows;
    const T* row = rows + (kAllRows ? first_row : min(first_row, row_lines - kRows));
    const T* column = columns + self % kLanes * kHalfColumns;
#pragma unroll
    for (int32_t k = 0; k < kDepth; ++k) {
      const Quad<T> a = *reinterpret_cast<const Quad<T>*>(row + k * (row_lines + 4));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const Quad<T> b =
            *reinterpret_cast<const Quad<T>*>(column + k * (kTileColumns + 4) + half * (kTileColumns / 2));
#pragma unroll
        for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
          for (int32_t j = 0; j < kHalfColumns; ++j) sums.at[i][half * kHalfColumns + j] += a.at[i] * b.at[j];
        }
      }
    }
  }

  // body(row, column, sums of columns `column` and `column + 1`) for the sums of this thread.
  template <typename Body>
  static __device__ __forceinline__ void each(int32_t self, Sums& sums, const Body& body) {
    const int32_t row = self / kLanes * kRows, column = self % kLanes * kHalfColumns;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (int32_t j = 0; j < 2 * kHalfColumns; j += 2) {
        body(row + i, column + j / kHalfColumns * (kTileColumns / 2) + j % kHalfColumns, sums.at[i][j], sums.at[i][j + 1]);
      }
    }
  }
};

struct Split {
  using Sum = float;
  static constexpr int32_t kDepth = 16;
  static constexpr int32_t kSmallestTile = 16;
  static constexpr int32_t kBlocksPerProcessor = 2;
  static constexpr int32_t kTransposedLanes = 8;
  static constexpr int32_t kRowTiles = 2, kColumnTiles = 4;  // of 16 x 8 sums a warp; 2 x 4 warps

  struct Sums {
    float at[kRowTiles][kColumnTiles][4];
  };
  struct Packed {
    uint32_t high, low;  // of a pair
  };

  static constexpr ANISO_INLINE int64_t elements(int64_t lines, int64_t depth) { return lines * depth; }

  static __device__ __forceinline__ Packed pack(float a, float b) {
    const uint32_t bits_a = bit_cast<uint32_t>(a), bits_b = bit_cast<uint32_t>(b);
    const float low_a = a - bit_cast<float>(bits_a & 0xffff0000u), low_b = b - bit_cast<float>(bits_b & 0xffff0000u);
    Packed packed{__byte_perm(bits_a, bits_b, 0x7632), 0};
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed.low) : "f"(low_b), "f"(low_a));
    return packed;
  }

  // Rows r and r + 8 of 16 share 32 words a slab: high parts in one half, low parts in the other, which way round
  // depends on r, so that two neighbouring r together use every bank.
  static __device__ __forceinline__ int32_t row_cell(int32_t group, int32_t r, int32_t low, int32_t quad, int32_t slab,
                                                     int32_t lines) {
    return ((slab * (lines / 16) + group) * 8 + r) * 32 + ((low ^ (r & 1)) * 4 + quad) * 4;
  }
  static __device__ __forceinline__ int32_t row_index(int32_t line, int32_t k, int32_t lines) {
    return row_cell(line / 16, line % 8, k % 2, k % 16 / 4, k / 16, lines) + k / 2 % 2 * 2 + line / 8 % 2;
  }
  static __device__ __forceinline__ void put_row(float* data, int32_t line, int32_t k, int32_t lines, float a, float b) {
    const Packed packed = pack(a, b);
    data[row_index(line, k, lines)] = bit_cast<float>(packed.high);
    data[row_index(line, k + 1, lines)] = bit_cast<float>(packed.low);
  }

  // A column has 16 words a slab; which quad comes first depends on the column, again for the banks.
  static __device__ __forceinline__ int32_t column_cell(int32_t line, int32_t quad) {
    return line * 16 + (quad ^ (line / 2 % 4)) * 4;
  }
  static __device__ __forceinline__ void put_column(float* data, int32_t line, int32_t k, const Quad<float>& quad) {
    const Packed first = pack(quad.at[0], quad.at[1]), second = pack(quad.at[2], quad.at[3]);
    *reinterpret_cast<uint4*>(data + column_cell(line, k / 4)) =
        make_uint4(first.high, second.high, first.low, second.low);
  }

  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }

  // Without kLowRows the rows are bf16 values and have no low parts.
  template <bool kLowRows, bool kAllRows>
  static __device__ __forceinline__ void multiply(int32_t self, const float* rows, int32_t row_lines, const float* columns, Sums& sums) {
    const int32_t r = self % kWarp / 4, quad = self % 4;
    uint4 high[kRowTiles], low[kRowTiles];
#pragma unroll
    for (int32_t i = 0; i < kRowTiles; ++i) {
      const int32_t tile = self / kWarp % 2 * kRowTiles + i;
      const int32_t group = kAllRows ? tile : min(tile, row_lines / 16 - 1);
      high[i] = *reinterpret_cast<const uint4*>(rows + row_cell(group, r, 0, quad, 0, row_lines));
      if (kLowRows) low[i] = *reinterpret_cast<const uint4*>(rows + row_cell(group, r, 1, quad, 0, row_lines));
    }
#pragma unroll
    for (int32_t j = 0; j < kColumnTiles; ++j) {
      const int32_t column = (self / kWarp / 2 * kColumnTiles + j) * 8 + r;
      const uint4 b = *reinterpret_cast<const uint4*>(columns + column_cell(column, quad));
#pragma unroll
      for (int32_t i = 0; i < kRowTiles; ++i) {
        multiply_add(sums.at[i][j], high[i], b.z, b.w);
        if (kLowRows) multiply_add(sums.at[i][j], low[i], b.x, b.y);
        multiply_add(sums.at[i][j], high[i], b.x, b.y);
      }
    }
  }

  template <typename Body>
  static __device__ __forceinline__ void each(int32_t self, Sums& sums, const Body& body) {
    const int32_t row = self / kWarp % 2 * 32 + self % kWarp / 4;
    const int32_t column = self / kWarp / 2 * 32 + self % 4 * 2;
#pragma unroll
    for (int32_t i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
      for (int32_t j = 0; j < kColumnTiles; ++j) {
        float(&four)[4] = sums.at[i / 2][j];
        body(row + i * 8, column + j * 8, four[i % 2 * 2], four[i % 2 * 2 + 1]);
      }
    }
  }
};

// Rows of an operand in shared memory.
template <typename E>
struct Lines {
  using T = typename E::Sum;
  T* data;
  int32_t lines;

  __device__ __forceinline__ T& raw(int32_t line, int32_t k) const { return data[E::row_index(line, k, lines)]; }
  // k is even; a raw pair may lie in the same place.
  __device__ __forceinline__ void put(int32_t line, int32_t k, T a, T b) const { E::put_row(data, line, k, lines, a, b); }
};

// Two buffers, so that one is filled while the other is read.
template <typename E>
struct alignas(16) Staging {
  using T = typename E::Sum;
  T rows[2][E::elements(kTileRows, E::kDepth)];
  T columns[2][E::elements(kTileColumns, E::kDepth)];
};

// Which quads of kLines x kDepth values a thread carries from global to shared memory: those at line() + kStep i and k().
// Threads are laid out such that a warp reads whole sectors.
template <typename E, int32_t kLines, bool kTransposed>
struct Carried {
  using T = typename E::Sum;
  static constexpr int32_t kAlong = E::kDepth / kQuad;  // threads along k
  static constexpr int32_t kAcross = kTransposed ? E::kTransposedLanes : 1;
  static constexpr int32_t kStep = kThreads / kAlong, kEach = kLines / kStep;
  static_assert(kLines % kStep == 0 && kStep % kAcross == 0, "every thread carries as much");

  static __device__ __forceinline__ int32_t line(int32_t self) {
    return self % kAcross + self / (kAcross * kAlong) * kAcross;
  }
  static __device__ __forceinline__ int32_t k(int32_t self) { return kQuad * (self / kAcross % kAlong); }
};

// weight(column, k): data[column * depth + k], or data[k * columns + column] where it is the transposed of what is stored.
template <typename T, bool kTransposedOf>
struct Weights {
  static constexpr bool kTransposed = kTransposedOf;
  const T* data;
  int32_t columns;
  int32_t depth;

  __device__ __forceinline__ int64_t column_stride() const { return kTransposed ? 1 : depth; }
  __device__ __forceinline__ int64_t depth_stride() const { return kTransposed ? columns : 1; }
};

// Columns [first, first + kTileColumns) of the weights on their way; zeros past the last column and past the depth.
template <typename E, typename W>
struct CarriedColumns {
  using T = typename E::Sum;
  using Base = Carried<E, kTileColumns, W::kTransposed>;
  Quad<T> quads[Base::kEach];
  const int32_t self;
  const W& weight;
  const T* cursor;
  int32_t columns_left, depth_left;
  bool whole;  // quads are read at once

  __device__ __forceinline__ CarriedColumns(int32_t self, const W& weight, int32_t first)
      : self(self),
        weight(weight),
        cursor(weight.data + (first + Base::line(self)) * weight.column_stride() + Base::k(self) * weight.depth_stride()),
        columns_left(weight.columns - first - Base::line(self)),
        depth_left(weight.depth - Base::k(self)),
        whole(!W::kTransposed && weight.depth % kQuad == 0 && aligned<Quad<T>>(weight.data)) {}

  // The next kDepth values.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int32_t i = 0; i < Base::kEach; ++i) {
      const T* at = cursor + i * Base::kStep * weight.column_stride();
      const int32_t left = i * Base::kStep < columns_left ? depth_left : 0;
      Quad<T>& quad = quads[i];
      quad = {};
      if (!W::kTransposed && whole) {
        if (left > 0) quad = constant(reinterpret_cast<const Quad<T>*>(at));
      } else {
#pragma unroll
        for (int32_t j = 0; j < kQuad; ++j) {
          if (j < left) quad.at[j] = constant(at + j * weight.depth_stride());
        }
      }
    }
    cursor += E::kDepth * weight.depth_stride();
    depth_left -= E::kDepth;
  }
  __device__ __forceinline__ void store(T* data) const {
#pragma unroll
    for (int32_t i = 0; i < Base::kEach; ++i) {
      E::put_column(data, Base::line(self) + i * Base::kStep, Base::k(self), quads[i]);
    }
  }
};

// Rows of a source on their way: source.quad(row, k, values left from k on, source.whole()) for row < rows, in the format
// of the source until source.values(quad) makes them values. That waits for the memory, so it comes after a product.
template <typename E, typename Source>
struct CarriedRows {
  using T = typename E::Sum;
  using Base = Carried<E, kTileRows, false>;
  static_assert(Base::kEach == 1, "one row a thread");
  const int32_t self;
  const Source& source;
  Quad<typename Source::Stored> stored;
  int32_t row, depth, at;
  bool whole;

  __device__ __forceinline__ CarriedRows(int32_t self, const Source& source, int32_t rows, int32_t depth)
      : self(self), source(source), row(min(Base::line(self), rows - 1)), depth(depth), at(Base::k(self)), whole(source.whole()) {}

  __device__ __forceinline__ void fetch() {
    stored = source.quad(row, at, depth - at, whole);
    at += E::kDepth;
  }
  __device__ __forceinline__ void store(T* data) const {
    const Quad<T> quad = source.values(stored);
    E::put_row(data, Base::line(self), Base::k(self), kTileRows, quad.at[0], quad.at[1]);
    E::put_row(data, Base::line(self), Base::k(self) + 2, kTileRows, quad.at[2], quad.at[3]);
  }
};

// store(row, column, sums of columns `column` and `column + 1`) for a thread's part of a product, each sum after
// update(row, column, sum). The updates come first, so that what they load is under way together.
template <typename E, typename Update, typename Store>
__device__ __forceinline__ void finish(int32_t first, int32_t columns, int32_t rows, typename E::Sums& sums,
                                       const Update& update, const Store& store) {
  using T = typename E::Sum;
  const int32_t self = fresh_thread();
  E::each(self, sums, [&](int32_t row, int32_t column, T& a, T& b) {
    if (row < rows && first + column < columns) a = update(row, first + column, a);
    if (row < rows && first + column + 1 < columns) b = update(row, first + column + 1, b);
  });
  E::each(self, sums, [&](int32_t row, int32_t column, T a, T b) {
    if (row < rows && first + column < columns) store(row, first + column, Pair<T>{a, b});
  });
}

struct Unchanged {
  template <typename T>
  __device__ __forceinline__ T operator()(int32_t, int32_t, T sum) const {
    return sum;
  }
};

// How exact products of float rows over D terms are added up: one running sum loses more than a library's product does. By
// steps takes as many registers again.
enum class Summing { kAtOnce, kBySteps };

// The product of rows that come from global memory, to `finish`. Source: quad() as above, and kExactHalf where its values
// are bf16. Ends with the staging buffers free.
template <typename E, Summing kSumming, typename W, typename Source, typename Update, typename Store>
__device__ __forceinline__ void multiply_rows(const Source& source, int32_t rows, const W& weight, Staging<E>& staging,
                                              const Update& update, const Store& store) {
#pragma unroll 1
  for (int32_t first = 0; first < weight.columns; first += kTileColumns) {
    const int32_t self = fresh_thread();
    typename E::Sums sums = {};
    CarriedRows<E, Source> carried_rows(self, source, rows, weight.depth);
    CarriedColumns<E, W> carried_columns(self, weight, first);
    carried_rows.fetch();
    carried_columns.fetch();
    int32_t buffer = 0;
#pragma unroll 1
    for (int32_t depth = 0; depth < weight.depth; depth += E::kDepth, buffer ^= 1) {
      carried_rows.store(staging.rows[buffer]);
      carried_columns.store(staging.columns[buffer]);
      __syncthreads();
      if (depth + E::kDepth < weight.depth) {
        carried_rows.fetch();
        carried_columns.fetch();
      }
      const auto add_step = [&](typename E::Sums& to) {
        E::template multiply<!Source::kExactHalf, true>(self, staging.rows[buffer], kTileRows, staging.columns[buffer], to);
      };
      constexpr bool kFloats = std::is_same_v<E, Exact<float>> && std::is_same_v<typename Source::Stored, float>;
      if constexpr (kSumming == Summing::kBySteps && kFloats) {
        typename E::Sums step = {};
        add_step(step);
        sums += step;
      } else {
        add_step(sums);
      }
    }
    __syncthreads();
    finish<E>(first, weight.columns, rows, sums, update, store);
  }
}

// The product of rows in shared memory, packed, with zeros from weight.depth up to the next multiple of E::kDepth.
template <typename E, typename W, typename Update, typename Store>
__device__ __forceinline__ void multiply_lines(const Lines<E>& lines, int32_t rows, const W& weight,
                                               Staging<E>& staging, const Update& update, const Store& store) {
#pragma unroll 1
  for (int32_t first = 0; first < weight.columns; first += kTileColumns) {
    const int32_t self = fresh_thread();
    typename E::Sums sums = {};
    CarriedColumns<E, W> carried(self, weight, first);
    carried.fetch();
    int32_t buffer = 0;
#pragma unroll 1
    for (int32_t depth = 0; depth < weight.depth; depth += E::kDepth, buffer ^= 1) {
      carried.store(staging.columns[buffer]);
      __syncthreads();
      if (depth + E::kDepth < weight.depth) carried.fetch();
      E::template multiply<true, false>(self, lines.data + E::elements(lines.lines, depth), lines.lines, staging.columns[buffer],
                                        sums);
    }
    __syncthreads();
    finish<E>(first, weight.columns, rows, sums, update, store);
  }
}

}  // namespace
}  // namespace aniso
