// What the Hopper kernels of the bounded update share: teams over states and deltas, their turns, and w before Q k.
#pragma once

#include "sm90_team.cuh"

namespace aniso::sm90 {

// Of two rows, four blocks of the rank side by side: sin, cos, log rho, dtheta and drho.
struct PolarFours {
  uint2 of[2][5];
};

// a_v tanh(dv) of a pair.
template <typename S>
__device__ __forceinline__ uint32_t step_of(uint32_t moves, float a_v) {
  const float2 move = unpack<S>(moves);
  return pack<S>(a_v * fast_tanh(move.x), a_v * fast_tanh(move.y));
}

template <typename S, int kCluster, int kChunks, bool kByChunk = false, typename Index = int64_t>
struct UpdateTeam : Team<S, Parts::kRounded, kCluster, kChunks, 1, kChunks <= 2 ? 3 : 2, 1, kByChunk, Index> {
  using Base = Team<S, Parts::kRounded, kCluster, kChunks, 1, kChunks <= 2 ? 3 : 2, 1, kByChunk, Index>;
  using typename Base::Shares;
  using Base::Base, Base::blocks, Base::count, Base::first_block, Base::readable_row, Base::row, Base::width;
  static constexpr int32_t kTurnGroups = Shares::kOwnGroups / 4;  // of four blocks side by side
  static constexpr uint32_t kBytes = Base::Layout::kOther;
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");

  // A chunk of v0 + step.
  __device__ __forceinline__ void begin_rows(int32_t c, const uint32_t (&step)[16], float (&w)[32]) const {
    this->for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&kept)[4]) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const float2 v0 = unpack<S>(kept[i]), moved = unpack<S>(step[8 * piece + 2 * i + half]);
        w[16 * piece + 4 * i + 2 * half] = v0.x + moved.x;
        w[16 * piece + 4 * i + 2 * half + 1] = v0.y + moved.y;
      }
    });
  }

  // The state and the deltas of the blocks that this thread turns.
  __device__ __forceinline__ void load_polar(const Sm90Rows<S>& state, const Sm90Rows<S>& deltas, PolarFours (&polar)[kTurnGroups]) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const S* state_row = state.data + readable_row(half) * state.stride + first_block;
      const S* deltas_row = deltas.data + readable_row(half) * deltas.stride + first_block;
#pragma unroll
      for (int32_t t = 0; t < kTurnGroups; ++t) {
#pragma unroll
        for (int32_t i = 0; i < 5; ++i) {
          const S* four = (i < 3 ? state_row + i * blocks : deltas_row + (i - 3) * blocks) + t * 16;
          polar[t].of[half][i] = load_half_line(four, first_block + t * 16 < blocks);
        }
      }
    }
  }

  // The block of group g and row `half` turned. Blocks past M have no radius.
  __device__ __forceinline__ Turn<float> turned(const PolarFours (&polar)[kTurnGroups], int32_t g, int32_t half,
                                                const Sm90Update<S>& in) const {
    const uint2(&of)[5] = polar[g / 4].of[half];
    Turn<float> turn = fast_turn(value_of<S>(of[0], g % 4), value_of<S>(of[1], g % 4), value_of<S>(of[2], g % 4),
                                 value_of<S>(of[3], g % 4), value_of<S>(of[4], g % 4), in.a_theta, in.a_rho);
    if (first_block + g / 4 * 16 >= blocks) turn.radius = 0.f;
    return turn;
  }

  // k = c^ - Q^T step of this block's share, from its share of Q^T step.
  __device__ __forceinline__ void turned_coefficients(const PolarFours (&polar)[kTurnGroups], const float (&projected)[Shares::kOwnGroups][4],
                                                      const Sm90Update<S>& in, uint32_t (&k)[Shares::kOwnSteps][4]) const {
#pragma unroll
    for (int32_t g = 0; g < Shares::kOwnGroups; ++g) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const Turn<float> turn = turned(polar, g, half, in);
        const float a = in.project ? projected[g][2 * half] : 0.f, b = in.project ? projected[g][2 * half + 1] : 0.f;
        k[g / 2][g % 2 * 2 + half] = pack<S>(fmaf(turn.radius, turn.cos, -a), fmaf(turn.radius, turn.sin, -b));
      }
    }
  }

  // Gradients of the state's and the deltas' polar parts, from this block's share of grad_c, into rows that follow each other.
  __device__ __forceinline__ void store_turn_gradients(const PolarFours (&polar)[kTurnGroups], const float (&grad_c)[Shares::kOwnGroups][4],
                                                       const Sm90Update<S>& in, S* grad_state, S* grad_deltas) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      S* state_row = grad_state + row(half) * (3 * blocks + width) + first_block;
      S* deltas_row = grad_deltas + row(half) * (2 * blocks + width) + first_block;
#pragma unroll
      for (int32_t t = 0; t < kTurnGroups; ++t) {
        float values[5][4];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float* grad = &grad_c[4 * t + i][2 * half];
          const TurnGradient<float> of = turn_backward(turned(polar, 4 * t + i, half, in), grad[0], grad[1], in.a_theta, in.a_rho);
          values[0][i] = of.sin0, values[1][i] = of.cos0, values[2][i] = of.log_radius;
          values[3][i] = of.delta_theta, values[4][i] = of.delta_rho;
        }
#pragma unroll
        for (int32_t i = 0; i < 5; ++i) {
          S* four = (i < 3 ? state_row + i * blocks : deltas_row + (i - 3) * blocks) + t * 16;
          store_half_line_inside(four, pack<S>(values[i][0], values[i][1]), pack<S>(values[i][2], values[i][3]),
                                 first_block + t * 16 < blocks && row(half) < count);
        }
      }
    }
  }
};

}  // namespace aniso::sm90
