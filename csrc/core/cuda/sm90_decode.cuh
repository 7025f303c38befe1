// The bounded update on Hopper: one read of state and deltas and one write of each row (METHOD section 4, D11).
//
//   c^ = turn(state, deltas)   step = a_v tanh(dv)   k = c^ - Q^T step (project)   w = Q k + v0 + step
//   e' = w/max(|w|, floor)     e = Norm(e' + shift)
//
// Shapes   state [N, 3M + D]; deltas [N, R + D]; out [N, D]; Q [D, R], R <= 128 and a multiple of 16, D <= 1280.
// Grid     as in sm90_correct.cuh: clusters of 2 or 4 blocks, each over tiles of 64 rows; a block has its columns of Q for good.
// A tile   1 dv comes; step waits in registers, as the first product's operand and for w; 2 v0 is on its way; each block collects its share
//          of Q^T step, 3 turns its blocks of the rank and hands k to the others; 4 w on top of v0 + step, and dv of the next tile is on its
//          way; 5 norms, summed from w over the cluster; 6 out.
// Shared   sm90_team.cuh. Dv and v0 take turns in a warpgroup's tile.
// Registers  w in fp32: 32 kChunks a thread. step is rounded once, so that Q^T step is that of the step that is taken; then k and the result.
// Global   5 M + 3 D storage values a row. Between the blocks of a cluster of C go (C - 1) 4 R bytes for each row.
// FLOP     4 D R for each row; D tanh.
#pragma once

#include "sm90_team.cuh"

namespace aniso::sm90 {

template <typename S>
struct UpdateArguments {
  Sm90Update<S> in;
  Sm90Rows<S> state;   // [N, 3M + D]
  Sm90Rows<S> deltas;  // [N, R + D]
  S* out;              // [N, D]
};

// step of a chunk of dv, as operands of a product.
template <typename S, typename T>
__device__ __forceinline__ void take_step(const T& team, int32_t c, float a_v, uint32_t (&step)[16]) {
  team.for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&moves)[4]) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const float2 move = unpack<S>(moves[i]);
      step[8 * piece + 2 * i + half] = pack<S>(a_v * fast_tanh(move.x), a_v * fast_tanh(move.y));
    }
  });
}

// A chunk of v0 + step.
template <typename S, typename T>
__device__ __forceinline__ void begin_rows(const T& team, int32_t c, const uint32_t (&step)[16], float (&w)[32]) {
  team.for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&kept)[4]) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const float2 v0 = unpack<S>(kept[i]), moved = unpack<S>(step[8 * piece + 2 * i + half]);
      w[16 * piece + 4 * i + 2 * half] = v0.x + moved.x;
      w[16 * piece + 4 * i + 2 * half + 1] = v0.y + moved.y;
    }
  });
}

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(kWarpgroups* kWarpgroupThreads, 1)
    sm90_decode_kernel(const __grid_constant__ CUtensorMap moves_map, const __grid_constant__ CUtensorMap complement_map,
                       const __grid_constant__ CUtensorMap basis_map, const __grid_constant__ UpdateArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = Team<S, kCluster, kChunks>;
  constexpr int32_t kOwnGroups = Mates::Shares::kOwnGroups;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Update<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.state.count);
  const auto& exchange = team.exchange;
  team.begin(basis_map, moves_map, in.shift);
  const float shift_squares = squares_of(in.shift, in.width, team.lane);

  uint32_t parity = 0;
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_coefficients();
      exchange.expect_sums(4);
    }

    // ---- step, and Q^T step from this block's columns
    uint32_t step[kChunks][16];
    float own[kOwnGroups][4];
    {
      float part[64] = {};
      wait_phase(team.loaded(), 0);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        take_step<S>(team, c, in.a_v, step[c]);
        pin(step[c]);
        products_begin();
        team.project_chunk(part, c, step[c]);
        products_commit();
      }
      team.load_after_reading(complement_map, team.tile);
      if (!team.is_first()) wait_phase(exchange.free(), parity ^ 1);
      products_wait();
      pin(part);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(step[c]);
      exchange.send_parts(part, own);
    }

    // ---- k of the blocks of the rank that this block collects
    PolarFours polar[Mates::kTurnGroups];
    team.load_polar(arguments.state, arguments.deltas, polar);
    wait_phase(exchange.projected(), parity);
    exchange.add_parts(own);
    uint32_t own_k[Mates::Shares::kOwnSteps][4];
    team.turned_coefficients(polar, own, in, own_k);
    exchange.send_coefficients(own_k);

    // ---- w
    float w[kChunks][32];
    wait_phase(team.loaded(), 1);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) begin_rows<S>(team, c, step[c], w[c]);
    team.load_after_reading(moves_map, team.tile + team.stride);
    wait_phase(exchange.mapped(), parity);
    uint32_t k[kSteps][4];
    exchange.all_coefficients(own_k, k);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
    products_begin();
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      team.rebuild_chunk(w[c], c, k);
      products_commit();
    }

    // ---- its norms
    float sums[4] = {};  // |w|^2 and w.shift of both rows
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      products_wait(kChunks - 1 - c);
      pin(w[c]);
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        float shift[8];
        team.load_shift(c, piece, shift);
#pragma unroll
        for (int32_t i = 0; i < 8; ++i) {
          const float* values = &w[c][16 * piece + i / 2 * 4 + i % 2];
          sums[0] = fmaf(values[0], values[0], sums[0]);
          sums[1] = fmaf(values[0], shift[i], sums[1]);
          sums[2] = fmaf(values[2], values[2], sums[2]);
          sums[3] = fmaf(values[2], shift[i], sums[3]);
        }
      }
    }
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) sums[i] = sum_over_row(sums[i]);
    exchange.sum_over_blocks(sums, parity);

    // ---- out
    float factor[2], shift_factor[2];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const Scales scales = fast_scales(sums[2 * half], sums[2 * half + 1], shift_squares, in.shift != nullptr);
      factor[half] = scales.inverse * scales.outer;
      shift_factor[half] = scales.outer;
    }
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        float shift[8];
        team.load_shift(c, piece, shift);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          uint32_t pairs[4];
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) {
            const float* values = &w[c][16 * piece + 4 * i + 2 * half];
            pairs[i] = pack<S>(fmaf(values[0], factor[half], shift[2 * i] * shift_factor[half]),
                               fmaf(values[1], factor[half], shift[2 * i + 1] * shift_factor[half]));
          }
          team.store_piece(arguments.out + team.row(half) * in.width, half, c, piece, pairs);
        }
      }
    }
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
