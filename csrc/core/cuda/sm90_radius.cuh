// The radius map of the blocks of the rank that a block of a cluster collects, by a table of cells or by search.
#pragma once

#include "aniso/block_math.h"
#include "sm90_layout.cuh"
#include "sm90_pieces.cuh"

namespace aniso::sm90 {

// Constants of the kColumns coordinates that a block maps, zero past R. t is the target's coordinate, t_b that plus the bias.
template <int kColumns>
struct Coordinates {
  float turned_bias[kColumns];    // t_b
  float scaled_target[kColumns];  // S t; t if S is diagonal
  float cross[kColumns];          // 2 (Q^T offset - S t_b); for a number S
  float shift[kColumns];          // Q^T shift; for a number S
  float cell_scale[kColumns / 2];
  float map[kColumns];  // of each block its last slope and the unit of its cells
};

template <int kCluster>
using CoordinateVectors = Coordinates<kRank / kCluster>;

// The radius and the direction of a block, and the cell of its radius map, asked for early: all blocks of a thread wait at once.
struct BlockLookup {
  float inverse, rho, place;  // 1/|(a, b)|, the radius, and where it lies in its cell
  uint32_t cell;              // two half-precision numbers
};

// All of a block's lookup but what its cell says; `cell` is which one it is.
__device__ __forceinline__ BlockLookup locate(float cell_scale, int32_t cell_count, float a, float b, int32_t* cell) {
  const float squared = a * a + b * b;
  BlockLookup block = {inverse_root(squared), square_root(squared + float(kRadiusEps)), 0.f, 0};
  const float place = fminf(block.rho * cell_scale, float(cell_count));  // a NaN falls in the last cell
  *cell = int32_t(place);
  block.place = place - float(*cell);
  return block;
}

__device__ __forceinline__ uint32_t load_cell(const uint32_t* cell) {
  uint32_t value;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(cell));
  return value;
}

__device__ __forceinline__ BlockLookup look_up(const uint32_t* cells, float cell_scale, int32_t cell_count, float a, float b) {
  int32_t cell;
  BlockLookup block = locate(cell_scale, cell_count, a, b, &cell);
  block.cell = load_cell(cells + cell);
  return block;
}

__device__ __forceinline__ bool is_coarse(uint32_t cell) { return (cell & 0x7fffu) > 0x7c00u; }

// The map is its last slope, and what the cell adds.
__device__ __forceinline__ float mapped_radius(const BlockLookup& block, float last_slope, float unit) {
  const float2 cell = unpack<Float16>(block.cell);
  return fmaf(block.rho, last_slope, unit * fmaf(block.place, cell.y, cell.x));
}

// The exact map of one block, for the few radii whose cell is too coarse.
template <typename S>
__device__ __forceinline__ Mapped<float> search_map(const Sm90Operands<S>& in, int32_t block, float rho) {
  const Segment<float>* segments = in.segments + int64_t(block) * in.pieces;
  const int32_t bucket = bucket_of(rho, float(in.bucket_count) / segments[in.pieces - 1].start, in.bucket_count);
  const int32_t base = in.buckets[int64_t(block) * in.bucket_count + bucket];
  return map_radius(segments, base, in.windows[block], rho);
}

struct Direction {
  float cos, sin;
};

// a^2 + b^2 is zero or below the normal numbers.
__device__ __forceinline__ bool is_at_origin(const BlockLookup& block) { return block.inverse > 1e18f; }

__device__ __forceinline__ Direction direction_of(const BlockLookup& block, float a, float b) {
  if (is_at_origin(block)) return {1.f, 0.f};
  return {a * block.inverse, b * block.inverse};
}

// Fills the constants of a block whose share of the rank begins at `first`. `columns`: of the basis, some of them past R.
template <int32_t columns = kRank, typename S, int kColumns>
__device__ __forceinline__ void fill(Coordinates<kColumns>& coordinates, const Sm90Operands<S>& in, int32_t first) {
  const float scalar = in.diagonal ? 1.f : in.scale[0];
  for (int32_t j = threadIdx.x; j < kColumns; j += blockDim.x) {
    const int32_t column = first + j;
    const bool inside = column < in.rank;
    const float target = inside ? in.target_coordinates[column] : 0.f;
    const float turned_bias = inside ? in.input_bias[column] + target : 0.f;
    coordinates.turned_bias[j] = turned_bias;
    coordinates.scaled_target[j] = scalar * target;
    coordinates.cross[j] = inside ? 2.f * (in.offset_coordinates[column] - scalar * turned_bias) : 0.f;
    coordinates.shift[j] = inside && in.shift != nullptr ? in.shift_coordinates[column] : 0.f;
    if (j % 2 == 0) coordinates.cell_scale[j / 2] = in.map_scales[column / 2];
    coordinates.map[j] = in.map_scales[(1 + j % 2) * (columns / 2) + column / 2];
  }
}

// Adds the bias to the coordinates of kGroups groups of a thread's columns, from `first` on, and maps their radii. column_of(group) is
// where the group's pair lies in the share, which begins at `first_column` of the rank. meanwhile() comes while cells are on their way.
template <int kGroups, typename S, int kColumns, int kOwnGroups, typename Column, typename Meanwhile>
__device__ __forceinline__ void map_radii(const Sm90Operands<S>& in, const Coordinates<kColumns>& coordinates, int32_t first_column,
                                          int32_t first, const Column& column_of, float (&own)[kOwnGroups][4],
                                          BlockLookup (&lookups)[kGroups][2], float (&radii)[kGroups][2], const Meanwhile& meanwhile) {
#pragma unroll
  for (int32_t i = 0; i < kGroups; ++i) {
    const int32_t g = first + i, column = column_of(g);
    const float2 turned_bias = load_pair(coordinates.turned_bias + column);
    const float cell_scale = coordinates.cell_scale[column / 2];
    const uint32_t* cells = in.cells + int64_t((first_column + column) / 2) * (in.cell_count + 1);
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      own[g][2 * half] += turned_bias.x;
      own[g][2 * half + 1] += turned_bias.y;
      lookups[i][half] = look_up(cells, cell_scale, in.cell_count, own[g][2 * half], own[g][2 * half + 1]);
    }
  }
  meanwhile();
  bool coarse = false;
#pragma unroll
  for (int32_t i = 0; i < kGroups; ++i) {
    const float2 map = load_pair(coordinates.map + column_of(first + i));
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      coarse = coarse || is_coarse(lookups[i][half].cell);
      radii[i][half] = mapped_radius(lookups[i][half], map.x, map.y);
    }
  }
  if (__any_sync(0xffffffffu, coarse)) {
#pragma unroll
    for (int32_t i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        if (!is_coarse(lookups[i][half].cell)) continue;
        radii[i][half] = search_map(in, (first_column + column_of(first + i)) / 2, lookups[i][half].rho).radius;
      }
    }
  }
}

// For gradients, which have other work while the cells come, in registers that lookups would take: add the bias to the coordinates and ask
// for the cells, each one register. True, which is known only once every coordinate of the warp is: the loads of cells themselves may be
// put off past what follows.
template <typename S, int kColumns, int kOwnGroups, typename Column>
__device__ __forceinline__ bool ask_for_cells(const Sm90Operands<S>& in, const Coordinates<kColumns>& coordinates, int32_t first_column,
                                              const Column& column_of, float (&own)[kOwnGroups][4], uint32_t (&cells)[kOwnGroups][2]) {
  int32_t together = 0;
#pragma unroll
  for (int32_t g = 0; g < kOwnGroups; ++g) {
    const int32_t column = column_of(g);
    const float2 turned_bias = load_pair(coordinates.turned_bias + column);
    const float cell_scale = coordinates.cell_scale[column / 2];
    const uint32_t* of_block = in.cells + int64_t((first_column + column) / 2) * (in.cell_count + 1);
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      own[g][2 * half] += turned_bias.x;
      own[g][2 * half + 1] += turned_bias.y;
      int32_t cell;
      locate(cell_scale, in.cell_count, own[g][2 * half], own[g][2 * half + 1], &cell);
      cells[g][half] = load_cell(of_block + cell);
      together |= cell;
    }
  }
  return __all_sync(0xffffffffu, together >= 0);
}

// A block of the rank at a length of (a, b), for gradients. At the origin the last two are zero.
struct MappedBlock {
  float cos, sin;
  float radius;   // T(rho)
  float along;    // dT/d length
  float inverse;  // 1/length
};

// map_backward() and polar_backward() of aniso/block_math.h with a fast reciprocal.
__device__ __forceinline__ float2 turned_back(const MappedBlock& at, float along, float across) {
  return {fmaf(at.cos, along, -at.sin * across), fmaf(at.sin, along, at.cos * across)};
}

__device__ __forceinline__ float2 fast_map_backward(const MappedBlock& at, float grad_a, float grad_b) {
  return turned_back(at, fmaf(grad_a, at.cos, grad_b * at.sin) * at.along,
                     fmaf(grad_b, at.cos, -grad_a * at.sin) * (at.radius * at.inverse));
}

__device__ __forceinline__ float2 fast_polar_backward(const MappedBlock& at, float grad_sin, float grad_cos, float grad_log) {
  return turned_back(at, at.inverse == 0.f ? 0.f : grad_log * at.along * reciprocal(at.radius),
                     fmaf(grad_sin, at.cos, -grad_cos * at.sin) * at.inverse);
}

// The rest once the cells are there: body(group, half, mapped block) for every block. The slope is that of the cell, which is
// right to what the rounding of the basis leaves of a radius; of a cell that is too coarse, that of the map.
template <typename S, int kColumns, int kOwnGroups, typename Column, typename Body>
__device__ __forceinline__ void for_each_mapped(const Sm90Operands<S>& in, const Coordinates<kColumns>& coordinates,
                                                int32_t first_column, const Column& column_of, float (&own)[kOwnGroups][4],
                                                const uint32_t (&cells)[kOwnGroups][2], const Body& body) {
  bool coarse = false;
#pragma unroll
  for (int32_t g = 0; g < kOwnGroups; ++g) coarse = coarse || is_coarse(cells[g][0]) || is_coarse(cells[g][1]);
  coarse = __any_sync(0xffffffffu, coarse);
#pragma unroll
  for (int32_t g = 0; g < kOwnGroups; ++g) {
    pin(own[g]);  // what follows from it is made again
    const int32_t column = column_of(g);
    const float cell_scale = coordinates.cell_scale[column / 2];
    const float2 map = load_pair(coordinates.map + column);
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const float a = own[g][2 * half], b = own[g][2 * half + 1];
      int32_t cell;
      BlockLookup block = locate(cell_scale, in.cell_count, a, b, &cell);
      block.cell = cells[g][half];
      const float rise = unpack<Float16>(block.cell).y;
      Mapped<float> mapped = {mapped_radius(block, map.x, map.y), fmaf(map.y * cell_scale, rise, map.x)};
      if (coarse && is_coarse(block.cell)) mapped = search_map(in, (first_column + column) / 2, block.rho);
      const auto [cos, sin] = direction_of(block, a, b);
      const bool origin = is_at_origin(block);
      body(g, half, MappedBlock{cos, sin, mapped.radius, origin ? 0.f : mapped.slope * reciprocal(block.rho * block.inverse),
                                origin ? 0.f : block.inverse});
    }
  }
}

}  // namespace aniso::sm90
