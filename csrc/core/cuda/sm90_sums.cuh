// Column sums of the closed form on Hopper: one read of the rows, none of them is built (METHOD section 4, D17).
//
//   sum e' = S sum y/|w| + Q sum k/|w| + offset sum 1/|w|       k = T(rho) (cos, sin) - S c_t, S a number
//   |w|^2 = k.k + 2 k.(S p + Q^T offset) + |S y + offset|^2     as Q^T Q = I
//
// Shapes   y [N, D]; partial [slots, D + R + 1], a slot for each warp: sums of y/|w|, k/|w| and 1/|w|; limits as in sm90_correct.cuh.
// A tile   1 to 4 as in sm90_correct.cuh, but for the coefficients, which stay; the next tile comes as soon as the rows are in registers.
// Registers  rows at two a register, and a sum for every column of a thread: 24 kChunks.
// Global   D storage values a row, and 4 bytes of the radius map for each of M blocks (from L2).
// FLOP     2 D R for each row.
#pragma once

#include "sm90_radius.cuh"
#include "sm90_team.cuh"

namespace aniso::sm90 {

template <typename S>
struct SumsArguments {
  Sm90Operands<S> in;
  int64_t count;
  float* partial;
};

template <typename S, int kCluster, int kChunks>
struct SumsTeam : Team<S, float, kCluster, kChunks, 1, 2> {
  using Base = Team<S, float, kCluster, kChunks, 1, 2>;
  using Base::Base;
  static constexpr uint32_t kBytes = Base::Layout::kOther + uint32_t(sizeof(CoordinateVectors<kCluster>));
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");
};

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(warpgroups(kChunks) * kWarpgroupThreads, 1)
    sm90_sums_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                     const __grid_constant__ SumsArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = SumsTeam<S, kCluster, kChunks>;
  constexpr int32_t kOwnGroups = Mates::Shares::kOwnGroups, kLookupGroups = 2;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.count);
  const auto& exchange = team.exchange;
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Mates::Layout::kOther);
  const float scalar = in.scale[0];
  const int32_t first_of_share = int32_t(cluster_rank()) * Mates::Shares::kOwnColumns;
  const auto column_of = [&](int32_t g) { return g / 4 * 32 + team.quarter * 8 + g % 4 * 2; };
  team.begin(basis_map, rows_map);
  team.keep_vector(kOffset, in.offset);
  fill(coordinates, in, first_of_share);
  team.end_of_beginning();
  const float offset_squares = squares_of(in.offset, in.width, team.lane);

  // Of y, k and 1 over |w|, for this thread's columns, coordinates and rows.
  float y_sums[kChunks][2][8] = {}, coefficient_sums[kOwnGroups][2] = {}, inverse_sum = 0.f;
  uint32_t parity = 0;
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_sums(4);
    }

    // ---- p from this block's columns
    float own[kOwnGroups][4];
    {
      float part[64] = {};
      wait_phase(team.loaded(), parity);
      uint32_t rows[2][16];  // all of them, beside the sums and the product, would not fit the registers
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        if (c >= 2) products_wait(1);
        team.load_chunk(c, rows[c % 2]);
        pin(rows[c % 2]);
        products_begin();
        team.project_chunk(part, c, rows[c % 2]);
        products_commit();
      }
      if (!team.is_first()) wait_phase(exchange.free(), parity ^ 1);
      products_wait();
      pin(part);
      exchange.send_parts(part, own);
    }

    // ---- the rows wait in registers
    uint32_t y[kChunks][16];
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      team.load_chunk(c, y[c]);
      pin(y[c]);
    }
    team.load_after_reading(rows_map, team.tile + team.stride);

    // ---- k of the blocks of the rank that this block collects, in the place of the coordinates
    wait_phase(exchange.projected(), parity);
    exchange.add_parts(own);
    float sums[4] = {};  // |w|^2 of both rows at 0 and 2
#pragma unroll
    for (int32_t first = 0; first < kOwnGroups; first += kLookupGroups) {
      BlockLookup lookups[kLookupGroups][2];
      float radii[kLookupGroups][2];
      map_radii<kLookupGroups>(in, coordinates, first_of_share, first, column_of, own, lookups, radii);
#pragma unroll
      for (int32_t i = 0; i < kLookupGroups; ++i) {
        const int32_t g = first + i;
        const float2 target = load_pair(coordinates.scaled_target + column_of(g)), cross = load_pair(coordinates.cross + column_of(g));
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          float &a = own[g][2 * half], &b = own[g][2 * half + 1], &sum = sums[2 * half];
          const Direction direction = direction_of(lookups[i][half], a, b);
          const float k_a = fmaf(radii[i][half], direction.cos, fmaf(-scalar, a, target.x));
          const float k_b = fmaf(radii[i][half], direction.sin, fmaf(-scalar, b, target.y));
          sum = fmaf(k_a, fmaf(2.f * scalar, a, cross.x) + k_a, sum);
          sum = fmaf(k_b, fmaf(2.f * scalar, b, cross.y) + k_b, sum);
          a = k_a, b = k_b;
        }
      }
    }

    // ---- y.y and y.offset
    float squares[2] = {}, along[2] = {};
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        float offset[8];
        team.load_vector(kOffset, c, piece, offset);
#pragma unroll
        for (int32_t i = 0; i < 8; ++i) {
          const float2 pair = unpack<S>(y[c][8 * piece + i]);
          squares[i % 2] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares[i % 2]));
          along[i % 2] = fmaf(pair.x, offset[i / 2 * 2], fmaf(pair.y, offset[i / 2 * 2 + 1], along[i % 2]));
        }
      }
    }

    // ---- norms, then the sums
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      sums[2 * half] = fmaf(scalar, fmaf(scalar, squares[half], 2.f * along[half]), sums[2 * half]);
    }
    exchange.send_sums(sums);
    exchange.receive_sums(sums, parity);
    float inverse[2];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const float own_inverse = fast_scales(sums[2 * half] + offset_squares, 0.f, 0.f, false).inverse;
      inverse[half] = team.row(half) < arguments.count ? own_inverse : 0.f;
    }
    const auto add_rows = [&](float& sum, float upper, float lower) { sum = fmaf(upper, inverse[0], fmaf(lower, inverse[1], sum)); };
    add_rows(inverse_sum, 1.f, 1.f);
#pragma unroll
    for (int32_t g = 0; g < kOwnGroups; ++g) {
      add_rows(coefficient_sums[g][0], own[g][0], own[g][2]);
      add_rows(coefficient_sums[g][1], own[g][1], own[g][3]);
    }
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float2 upper = unpack<S>(y[c][8 * piece + 2 * i]), lower = unpack<S>(y[c][8 * piece + 2 * i + 1]);
          add_rows(y_sums[c][piece][2 * i], upper.x, lower.x);
          add_rows(y_sums[c][piece][2 * i + 1], upper.y, lower.y);
        }
      }
    }
    exchange.warp_is_done();
  }

  // ---- this warp's slot
  const int32_t lane_row = team.lane / 4;
  const int32_t slot = (int32_t(cluster_index()) * Mates::kWarpgroups + team.warpgroup) * kWarps + exchange.warp;
  float* partial = arguments.partial + int64_t(slot) * (in.width + kSm90SumColumns);
#pragma unroll
  for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      const int32_t column = c * kChunkColumns + piece * 32;
      const float sum = scalar * sum_over_column(y_sums[c][piece], lane_row);
      if (column < team.columns_left) partial[team.own_column + column + lane_row] = sum;
    }
  }
#pragma unroll
  for (int32_t g = 0; g < kOwnGroups; ++g) {
#pragma unroll
    for (int32_t side = 0; side < 2; ++side) {
      const float sum = sum_over_rows(coefficient_sums[g][side]);
      if (lane_row == 0) partial[in.width + first_of_share + column_of(g) + side] = sum;
    }
  }
  const float sum = sum_over_rows(inverse_sum);
  if (team.lane == 0 && cluster_rank() == 0) partial[in.width + kRank] = sum;
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
