// Gradient of the encoding (sm90_correct.cuh) with respect to the source rows.
//
//   grad_p = polar_backward(grad of sin, cos, log) - S Q^T g      grad_y = S g + Q grad_p      g: the gradient at the complement
//
// Shapes   grad [N, 3M + D]; y, grad_y [N, D]; Q [D, R], R <= 128 and a multiple of 16, D <= 1280; S a number; cells [M, G + 1].
// Grid     as in sm90_correct.cuh: clusters of 2 or 4 blocks, each over tiles of 64 rows; a block has its columns of Q for good.
// A tile   1 y comes, and is multiplied and forgotten; g is on its way; 2 each block collects its share of p and asks for the cells of its
//          radius maps and for the other gradients; 3 g waits in registers, as the second product's operand and for the result; y of the
//          next tile is on its way, and its g to the second-level cache; 4 each block collects its share of Q^T g and hands grad_p to the
//          others; 5 S g + Q grad_p goes out.
// Shared   sm90_team.cuh, and the constants of the coordinates. Y and g take turns in a warpgroup's tile. Parts of Q^T g only meet
//          coefficients that are rounded themselves, and so travel rounded; parts of p do not.
// Registers  g at half of what the result takes in fp32, 32 kChunks a thread; between them two numbers, a cell and three gradients a block.
// Global   3 (M + D) storage values a row, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster
//          of C go (C - 1) R (4 + 2 + 2) bytes for each row.
// FLOP     6 D R for each row.
#pragma once

#include "sm90_gradient.cuh"

namespace aniso::sm90 {

template <typename S>
struct EncodeGradientArguments {
  Sm90Operands<S> in;
  Sm90Rows<S> grad;  // [N, 3M + D]
  S* grad_y;         // [N, D]
};

// Of two rows, four blocks of the rank side by side: the gradients of sin, cos and log T(rho).
struct PolarGradients {
  uint2 of[2][3];
};

template <typename S, int kCluster, int kChunks>
struct EncodeGradientTeam : Team<S, Parts::kExactThenRounded, kCluster, kChunks, 1, 2, 0, false, int32_t> {
  using Base = Team<S, Parts::kExactThenRounded, kCluster, kChunks, 1, 2, 0, false, int32_t>;
  using typename Base::Shares;
  using Base::Base, Base::blocks, Base::first_block, Base::kTurnGroups, Base::readable_row;
  static constexpr int32_t kOwnGroups = Shares::kOwnGroups;
  static constexpr Reuse kReuse = Reuse::kUnknown;  // of y and g: here it costs time to say more
  static constexpr uint32_t kBytes = Base::Layout::kOther + uint32_t(sizeof(CoordinateVectors<kCluster>));
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");

  __device__ __forceinline__ void load_polar(const Sm90Rows<S>& grad, PolarGradients (&polar)[kTurnGroups]) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const S* row = grad.data + readable_row(half) * grad.stride + first_block;
#pragma unroll
      for (int32_t t = 0; t < kTurnGroups; ++t) {
#pragma unroll
        for (int32_t i = 0; i < 3; ++i) polar[t].of[half][i] = load_half_line(row + i * blocks + t * 16, first_block + t * 16 < blocks);
      }
    }
  }

  // grad_p of this block's share from its coordinates and its share of Q^T g.
  __device__ __forceinline__ void share_of_gradient(const Sm90Operands<S>& in, const CoordinateVectors<kCluster>& coordinates, float scalar,
                                                    const PolarGradients (&polar)[kTurnGroups], const uint32_t (&cells)[kOwnGroups][2],
                                                    float (&own)[kOwnGroups][4], const float (&back)[kOwnGroups][4],
                                                    uint32_t (&k)[Shares::kOwnSteps][4]) const {
    for_each_mapped(
        in, coordinates, int32_t(cluster_rank()) * Shares::kOwnColumns, [&](int32_t g) { return this->column_of(g); }, own, cells,
        [&](int32_t g, int32_t half, const MappedBlock& at) {
          const uint2(&of)[3] = polar[g / 4].of[half];
          const float2 grad = fast_polar_backward(at, value_of<S>(of[0], g % 4), value_of<S>(of[1], g % 4), value_of<S>(of[2], g % 4));
          k[g / 2][g % 2 * 2 + half] = pack<S>(fmaf(-scalar, back[g][2 * half], grad.x), fmaf(-scalar, back[g][2 * half + 1], grad.y));
        });
  }

  // A chunk of S g.
  __device__ __forceinline__ void begin_rows(const uint32_t (&g)[16], float scalar, float (&w)[32]) const {
#pragma unroll
    for (int32_t i = 0; i < 16; ++i) {
      const float2 pair = unpack<S>(g[i]);
      w[2 * i] = scalar * pair.x, w[2 * i + 1] = scalar * pair.y;
    }
  }
};

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(EncodeGradientTeam<S, kCluster, kChunks>::kThreads, 1)
    sm90_encode_backward_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap grad_map,
                                const __grid_constant__ CUtensorMap basis_map,
                                const __grid_constant__ EncodeGradientArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = EncodeGradientTeam<S, kCluster, kChunks>;
  constexpr int32_t kOwnGroups = Mates::kOwnGroups;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.grad.count);
  const auto& exchange = team.exchange;
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Mates::Layout::kOther);
  const float scalar = in.scale[0];
  const auto same = [](uint32_t pair) { return pair; };
  team.begin(basis_map, rows_map);
  fill(coordinates, in, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns);
  team.end_of_beginning();

  uint32_t parity = 0;  // of the coefficients; parts, loads and what is free come twice a tile
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_coefficients();
    }

    // ---- p of the blocks of the rank that this block collects
    float own[kOwnGroups][4];
    uint32_t cells[kOwnGroups][2];
    PolarGradients polar[Mates::kTurnGroups];
    {
      uint32_t y[kChunks][16];
      collect_coordinates(team, in, coordinates, grad_map, y, own, cells, [] {});
    }

    // ---- Q^T g
    team.forget_addresses();
    team.load_polar(arguments.grad, polar);
    uint32_t g[kChunks][16];
    float back[kOwnGroups][4];
    wait_phase(team.loaded(), 1);
    team.template project_and_send<true>(g, back, same, [&] {
      team.load_after_reading(rows_map, team.tile + team.stride);
      team.prefetch(grad_map, team.tile + team.stride);
      wait_phase(exchange.free(), 0);
    });
    team.forget_addresses();
    wait_phase(exchange.projected(), 1);
    exchange.template add_parts<true>(back);

    // ---- grad_p
    uint32_t own_k[Mates::Shares::kOwnSteps][4];
    team.share_of_gradient(in, coordinates, scalar, polar, cells, own, back, own_k);
    exchange.send_coefficients(own_k);

    // ---- S g + Q grad_p
    team.forget_addresses();
    float rows[kChunks][32];
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.begin_rows(g[c], scalar, rows[c]);
    wait_phase(exchange.mapped(), parity);
    team.template rebuild_rows<kChunks>(rows, own_k, 0, [] {},
                                        [&](int32_t c) { team.store_chunk(rows[c], c, arguments.grad_y, team.width, 0); });
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
