// Gradient of the bounded update (sm90_decode.cuh) with respect to the state and the deltas.
//
//   grad_w = gradient at w from that at e (row_scales.h)      grad_v0 = grad_w      grad_c = Q^T grad_w
//   grad of sin, cos, log rho, dtheta, drho: turn_backward(grad_c)
//   grad_dv = a_v (1 - tanh(dv)^2) (grad_w - Q grad_c)        without the last term unless the update projects
//
// Shapes   grad [N, D]; state, grad_state [N, 3M + D]; deltas, grad_deltas [N, R + D]; Q [D, R]. Limits as in sm90_decode.cuh.
// A tile   each chunk of it with a barrier of its own; 1 to 4 as in sm90_decode.cuh, up to w, then grad comes; 5 norms and products with
//          grad, summed over the cluster; 6 grad_w goes out, rounded, and waits as the operand of Q^T grad_w, which the blocks collect;
//          7 the turned blocks' gradients go out, grad_c goes round; dv comes again, mostly from L2; 8 Q grad_c, chunk by chunk, and
//          grad_dv goes out.
// Registers  w in fp32, 32 kChunks a thread, then half as many for grad_w.
// Global   10 M + 5 D storage values a row, and dv once more: the second-level cache is told to keep it, and to keep nothing else.
// FLOP     8 D R for each row; 2 D tanh.
#pragma once

#include "sm90_decode.cuh"

namespace aniso::sm90 {

template <typename S>
struct UpdateGradientArguments {
  Sm90Update<S> in;
  Sm90Rows<S> state, deltas;
  S* grad_state;   // [N, 3M + D]
  S* grad_deltas;  // [N, R + D]
};

// Which order leaves most registers, and so is fastest, differs with the width and the format: a chunk is filled again once it has been
// read or once the tile has, the state comes early or late, addresses are made again from few numbers or from many.
template <typename S, int kCluster, int kChunks>
struct UpdateGradientTeam : UpdateTeam<S, kCluster, kChunks, true, int32_t> {
  using Base = UpdateTeam<S, kCluster, kChunks, true, int32_t>;
  using Base::Base;
  static constexpr bool kEachChunk = kCluster == 2 || kChunks == 4 || (kChunks == 5 && !std::is_same_v<S, BFloat16>);
  static constexpr bool kEachChunkLast = kEachChunk || kChunks == 3;  // by dv of the next tile
  static constexpr bool kStateEarly = !kEachChunk;

  __device__ __forceinline__ void forget_addresses() {
    if constexpr (kChunks == 3) {
      Base::forget_addresses();
    } else {
      this->remake_addresses();
    }
  }
};

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(UpdateGradientTeam<S, kCluster, kChunks>::kThreads, 1)
    sm90_decode_backward_kernel(const __grid_constant__ CUtensorMap moves_map, const __grid_constant__ CUtensorMap complement_map,
                                const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ CUtensorMap basis_map,
                                const __grid_constant__ UpdateGradientArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = UpdateGradientTeam<S, kCluster, kChunks>;
  constexpr int32_t kOwnGroups = Mates::Shares::kOwnGroups, kOwnSteps = Mates::Shares::kOwnSteps;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Update<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.state.count);
  const auto& exchange = team.exchange;
  team.begin(basis_map, moves_map);
  team.keep_vector(kShift, in.shift);
  team.end_of_beginning();
  const float shift_squares = dot_of(in.shift, in.shift, in.width, team.lane);
  const bool shifted = in.shift != nullptr;

  uint32_t parity = 0;  // of what happens once a tile; parts, coefficients and two loads come twice
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_coefficients();
      exchange.expect_sums(8);
    }

    // ---- w
    PolarFours polar[Mates::kTurnGroups];
    float own[kOwnGroups][4];
    uint32_t own_k[kOwnSteps][4];
    float w[kChunks][32];
    {
      uint32_t step[kChunks][16];
      if constexpr (Mates::kStateEarly) team.load_polar(arguments.state, arguments.deltas, polar);
      team.project_and_send(
          step, own, [&](uint32_t moves) { return step_of<S>(moves, in.a_v); }, [&](int32_t c) { wait_phase(team.loaded(c), 0); },
          [&](int32_t c) { team.load_after_reading(complement_map, team.tile, c, Reuse::kNever, Mates::kEachChunk); },
          [&] { team.wait_for_last_tile(parity); });
      team.forget_addresses();
      if constexpr (!Mates::kStateEarly) team.load_polar(arguments.state, arguments.deltas, polar);
      wait_phase(exchange.projected(), 0);
      if (team.leader) exchange.expect_parts();
      exchange.add_parts(own);
      team.turned_coefficients(polar, own, in, own_k);
      exchange.send_coefficients(own_k);
      team.forget_addresses();
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        wait_phase(team.loaded(c), 1);
        team.begin_rows(c, step[c], w[c]);
        team.load_after_reading(grad_map, team.tile, c, Reuse::kNever, Mates::kEachChunk);
      }
    }
    wait_phase(exchange.mapped(), 0);
    if (team.leader) exchange.expect_coefficients();

    // ---- its norms and products with grad
    float sums[8] = {};  // of each row |w|^2, w.shift, w.grad and grad.shift
    team.template rebuild_rows<kChunks>(w, own_k, 0, [&] { team.forget_addresses(); }, [&](int32_t c) {
      wait_phase(team.loaded(c), 0);
      team.for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&grads)[4]) {
        float shift[8];
        team.load_vector(kShift, c, piece, shift);
        float* of = &sums[4 * half];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float* values = &w[c][16 * piece + 4 * i + 2 * half];
          const float2 grad = unpack<S>(grads[i]);
          of[0] = fmaf(values[0], values[0], fmaf(values[1], values[1], of[0]));
          of[1] = fmaf(values[0], shift[2 * i], fmaf(values[1], shift[2 * i + 1], of[1]));
          of[2] = fmaf(values[0], grad.x, fmaf(values[1], grad.y, of[2]));
          of[3] = fmaf(grad.x, shift[2 * i], fmaf(grad.y, shift[2 * i + 1], of[3]));
        }
      });
    });
    exchange.send_sums(sums);
    exchange.receive_sums(sums, parity);

    // ---- grad_w
    team.forget_addresses();
    uint32_t grad_w[kChunks][16];  // operands of a product, as step was
    {
      RowGradient<float> at[2];
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) at[half] = fast_row_gradient(&sums[4 * half], shift_squares, shifted);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        team.for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&grads)[4]) {
          float shift[8];
          team.load_vector(kShift, c, piece, shift);
          uint32_t pairs[4];
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) {
            const float* values = &w[c][16 * piece + 4 * i + 2 * half];
            const float2 grad = unpack<S>(grads[i]);
            const auto value = [&](float grad, float w, float g) {
              return fmaf(at[half].grad, grad, fmaf(-at[half].row, w, -at[half].shift * g));
            };
            pairs[i] = pack<S>(value(grad.x, values[0], shift[2 * i]), value(grad.y, values[1], shift[2 * i + 1]));
            grad_w[c][8 * piece + 2 * i + half] = pairs[i];
          }
          S* line = arguments.grad_state + team.row(half) * (3 * team.blocks + in.width) + 3 * team.blocks;
          team.store_piece(line, half, c, piece, pairs);
        });
        team.load_after_reading(moves_map, team.tile, c, Reuse::kNever, Mates::kEachChunk);
      }
    }

    // ---- grad_c of the blocks that this block collects, and what follows for their turns
    {
      float part[64] = {};
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(grad_w[c]);
      products_begin();
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) team.project_chunk(part, c, grad_w[c]);
      products_commit();
      team.load_polar(arguments.state, arguments.deltas, polar);
      team.projection_done(grad_w, part);
      exchange.send_parts(part, own);
    }
    team.forget_addresses();
    wait_phase(exchange.projected(), 1);
    exchange.add_parts(own);
#pragma unroll
    for (int32_t g = 0; g < kOwnGroups; ++g) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        own_k[g / 2][g % 2 * 2 + half] = in.project ? pack<S>(4.f * in.a_v * own[g][2 * half], 4.f * in.a_v * own[g][2 * half + 1]) : 0;
      }
    }
    exchange.send_coefficients(own_k);
    team.store_turn_gradients(polar, own, in, arguments.grad_state, arguments.grad_deltas);

    // ---- grad_dv
    team.forget_addresses();
    wait_phase(exchange.mapped(), 1);
    uint32_t k[kSteps][4];
    exchange.all_coefficients(own_k, k);
    team.for_each_product(k, [&](int32_t c, const float(&back)[32]) {
      wait_phase(team.loaded(c), 1);
      team.for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&moves)[4]) {
        uint32_t pairs[4];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float* values = &back[16 * piece + 4 * i + 2 * half];
          const float2 grad = unpack<S>(grad_w[c][8 * piece + 2 * i + half]), move = unpack<S>(moves[i]);
          const auto value = [&](float grad, float back, float move) {
            return quarter_tanh_slope(move) * fmaf(4.f * in.a_v, grad, -back);
          };
          pairs[i] = pack<S>(value(grad.x, values[0], move.x), value(grad.y, values[1], move.y));
        }
        team.store_piece(arguments.grad_deltas + team.row(half) * (in.rank + in.width) + in.rank, half, c, piece, pairs);
      });
      team.load_after_reading(moves_map, team.tile + team.stride, c, Reuse::kSoon, Mates::kEachChunkLast);
    });
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
