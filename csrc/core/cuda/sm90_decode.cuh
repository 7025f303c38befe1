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

#include "sm90_update.cuh"

namespace aniso::sm90 {

template <typename S>
struct UpdateArguments {
  Sm90Update<S> in;
  Sm90Rows<S> state;   // [N, 3M + D]
  Sm90Rows<S> deltas;  // [N, R + D]
  S* out;              // [N, D]
};

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(UpdateTeam<S, kCluster, kChunks>::kThreads, 1)
    sm90_decode_kernel(const __grid_constant__ CUtensorMap moves_map, const __grid_constant__ CUtensorMap complement_map,
                       const __grid_constant__ CUtensorMap basis_map, const __grid_constant__ UpdateArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = UpdateTeam<S, kCluster, kChunks>;
  constexpr int32_t kOwnGroups = Mates::Shares::kOwnGroups;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Update<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.state.count);
  const auto& exchange = team.exchange;
  team.begin(basis_map, moves_map);
  team.keep_vector(kShift, in.shift);
  team.end_of_beginning();
  const float shift_squares = dot_of(in.shift, in.shift, in.width, team.lane);

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
    wait_phase(team.loaded(), 0);
    team.project_and_send(
        step, own, [&](uint32_t moves) { return step_of<S>(moves, in.a_v); },
        [&] {
          team.load_after_reading(complement_map, team.tile);
          team.wait_for_last_tile(parity);
        });

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
    for (int32_t c = 0; c < kChunks; ++c) team.begin_rows(c, step[c], w[c]);
    team.load_after_reading(moves_map, team.tile + team.stride);
    wait_phase(exchange.mapped(), parity);

    // ---- its norms
    float sums[4] = {};
    team.template rebuild_rows<kChunks>(w, own_k, 0, [] {}, [&](int32_t c) { team.add_squares(w[c], c, sums); });
    exchange.send_sums(sums);
    exchange.receive_sums(sums, parity);

    // ---- out
    Scales scales[2];
    fast_scales(sums, shift_squares, in.shift != nullptr, scales);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.store_unit_rows(w[c], c, scales, arguments.out);
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
