// Gradient of the closed form (sm90_correct.cuh) with respect to the source rows, where Q^T Q = I. It builds no w:
//
//   h = Q^T t        u = k + S p + Q^T offset = Q^T w        k = T(rho) (cos, sin) - S c_t        t: the gradient at e
//   |w|^2 = k.(k + 2 (S p + Q^T offset)) + y.S (S y + 2 offset) + |offset|^2        w.t = k.h + t.(S y + offset)
//   w.shift = k.(Q^T shift) + S y.shift + offset.shift
//   grad_w = alpha t - beta w - gamma shift (row_scales.h)        grad_k = Q^T grad_w = alpha h - beta u - gamma Q^T shift
//   grad_y = Q (map_backward(grad_k) - S grad_k - S beta k) + S (alpha t - beta (S y + offset) - gamma shift)
//
// Shapes   t, y, grad_y [N, D]; Q [D, R], R <= 128, D <= 1280; S a number; cells [M, G + 1].
// Grid     as in sm90_correct.cuh: clusters of 2 or 4 blocks, each over tiles of 64 rows; a block has its columns of Q for good.
// A tile   1 y comes, waits in registers, and is multiplied; t is on its way, and so are sums over y; 2 each block collects its share of p
//          and asks for the cells of its radius maps; 3 t is multiplied, and stays in the tile; 4 while parts of h are on their way: sums
//          over t, and k and the radius maps of each block of the rank; each block collects its share of h; 5 four sums a row, over the
//          cluster; 6 each block hands coefficients to the others; meanwhile y and t become what is not in the span of Q, and y of the next
//          tile is on its way; 7 out.
// Shared   as in sm90_encode_backward.cuh, the offset and the shift (sm90_tail.cuh).
// Registers  y at half of what the result takes in fp32, 32 kChunks a thread; t is read from the tile wherever it is needed. Between the
//          sums and the coefficients nine numbers a block and row.
// Global   3 D storage values a row, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster
//          of C go (C - 1) R (4 + 2 + 2) bytes for each row.
// FLOP     6 D R for each row.
#pragma once

#include "sm90_gradient.cuh"
#include "sm90_tail.cuh"

namespace aniso::sm90 {

template <typename S>
struct CorrectGradientArguments {
  Sm90Operands<S> in;
  int64_t count;
  S* grad_y;  // [N, D]
};

// Of a block of the rank in one row, until the gradient at it is known: k, u, and how a gradient passes the radius map.
struct BlockInRow {
  float2 k, u;
  MappedBlock at;
};

template <typename S, int kCluster, int kChunks>
struct CorrectGradientTeam : Team<S, Parts::kExactThenRounded, kCluster, kChunks, 1, 2, 0, false, int32_t> {
  using Base = Team<S, Parts::kExactThenRounded, kCluster, kChunks, 1, 2, 0, false, int32_t>;
  using typename Base::Shares;
  using Base::Base;
  static constexpr int32_t kOwnGroups = Shares::kOwnGroups;
  static constexpr Reuse kReuse = Reuse::kNever;  // of y and t
  static constexpr uint32_t kConstants = (Base::Layout::kOther + 15) / 16 * 16;
  static constexpr uint32_t kTail = kConstants + (uint32_t(sizeof(CoordinateVectors<kCluster>)) + 15) / 16 * 16;
  static constexpr uint32_t kDots = kTail + VectorTail<S, kChunks>::kBytes;
  static constexpr uint32_t kBytes = kDots + 16;
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");

  // By which the fewest registers are spilled.
  __device__ __forceinline__ void forget_addresses() {
    if constexpr (kChunks < 5) {
      this->remake_addresses();
    } else {
      Base::forget_addresses();
    }
  }

  __device__ __forceinline__ VectorTail<S, kChunks> tail() const { return {this->shared + kTail, this->lane}; }

  // Products of the vectors, each of which would take a register.
  __device__ __forceinline__ void keep_dots(const float* offset, const float* shift) const {
    if (threadIdx.x / 32 != 0) return;
    const float dots[3] = {dot_of(shift, shift, this->width, this->lane), dot_of(offset, offset, this->width, this->lane),
                           dot_of(offset, shift, this->width, this->lane)};
    if (this->lane < 3) {
      store_shared(this->shared + kDots + this->lane * 4, this->lane == 0 ? dots[0] : this->lane == 1 ? dots[1] : dots[2]);
    }
  }

  // |shift|^2, |offset|^2 and offset.shift.
  __device__ __forceinline__ float4 dots() const { return load_shared(this->shared + kDots); }

  // What y contributes to the sums of its rows: y.S (S y + 2 offset) and S y.shift.
  __device__ __forceinline__ void sums_of_rows(const uint32_t (&y)[kChunks][16], float scalar, float (&sums)[8]) const {
    RowProducts<S> products;
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) products.add(y[c], y[c], tail(), c);
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      sums[4 * half] = scalar * fmaf(scalar, products.of_rows(this->lane, half), 2.f * products.of_offset(this->lane, half));
      sums[4 * half + 1] = scalar * products.of_shift(this->lane, half);
    }
  }

  // What t contributes, which is in the tile: t.(S y + offset) and t.shift.
  __device__ __forceinline__ void sums_of_grads(const uint32_t (&y)[kChunks][16], float scalar, float (&sums)[8]) const {
    RowProducts<S> products;
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      uint32_t grads[16];
      this->load_chunk(c, grads);
      products.add(grads, y[c], tail(), c);
    }
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      sums[4 * half + 2] = fmaf(scalar, products.of_rows(this->lane, half), products.of_offset(this->lane, half));
      sums[4 * half + 3] = products.of_shift(this->lane, half);
    }
  }

  // A chunk of S (alpha t - beta (S y + offset) - gamma shift); t is in the tile. `vectors`: the factors of offset and shift.
  __device__ __forceinline__ void begin_rows(int32_t c, const uint32_t (&y)[16], float scalar, const RowGradient<float> (&at)[2],
                                             const uint32_t (&vectors)[2], float (&w)[32]) const {
    this->for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&grads)[4]) {
      const float of_grad = scalar * at[half].grad, of_row = -scalar * scalar * at[half].row;
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const float2 grad = unpack<S>(grads[i]), row = unpack<S>(y[8 * piece + 2 * i + half]);
        w[16 * piece + 4 * i + 2 * half] = fmaf(of_grad, grad.x, of_row * row.x);
        w[16 * piece + 4 * i + 2 * half + 1] = fmaf(of_grad, grad.y, of_row * row.y);
      }
    });
    tail().add_vectors(vectors, c, w);
  }
};

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(CorrectGradientTeam<S, kCluster, kChunks>::kThreads, 1)
    sm90_correct_backward_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap grad_map,
                                 const __grid_constant__ CUtensorMap basis_map,
                                 const __grid_constant__ CorrectGradientArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = CorrectGradientTeam<S, kCluster, kChunks>;
  constexpr int32_t kOwnGroups = Mates::kOwnGroups;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.count);
  const auto& exchange = team.exchange;
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Mates::kConstants);
  const float scalar = in.scale[0];
  const bool shifted = in.shift != nullptr;
  team.begin(basis_map, rows_map);
  team.tail().keep(in.offset, in.shift, team.first_column, in.width);
  fill(coordinates, in, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns);
  team.keep_dots(in.offset, in.shift);
  team.end_of_beginning();

  uint32_t parity = 0;  // of coefficients and sums; parts, loads and what is free come twice a tile
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_coefficients();
      exchange.expect_sums(8);
    }

    // ---- p of the blocks of the rank that this block collects
    uint32_t y[kChunks][16];
    float own[kOwnGroups][4];
    uint32_t cells[kOwnGroups][2];
    float sums[8];  // of each row |w|^2, w.shift, w.t and t.shift
    collect_coordinates(team, in, coordinates, grad_map, y, own, cells, [&] { team.sums_of_rows(y, scalar, sums); });

    // ---- h
    team.forget_addresses();
    float h[kOwnGroups][4];
    wait_phase(team.loaded(), 1);
    team.template project_standing_and_send<true>(h, [&] { wait_phase(exchange.free(), 0); });
    team.sums_of_grads(y, scalar, sums);
    team.forget_addresses();

    // ---- the norms and products of w, and their gradient
    BlockInRow blocks[kOwnGroups][2];
    for_each_mapped(
        in, coordinates, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns, [&](int32_t g) { return team.column_of(g); }, own, cells,
        [&](int32_t g, int32_t half, const MappedBlock& at) {
          const int32_t column = team.column_of(g);
          const float2 target = load_pair(coordinates.scaled_target + column), cross = load_pair(coordinates.cross + column);
          const float2 shift = load_pair(coordinates.shift + column);
          const float a = own[g][2 * half], b = own[g][2 * half + 1];
          const float2 k = {fmaf(at.radius, at.cos, fmaf(-scalar, a, target.x)), fmaf(at.radius, at.sin, fmaf(-scalar, b, target.y))};
          const float2 twice = {fmaf(2.f * scalar, a, cross.x), fmaf(2.f * scalar, b, cross.y)};  // 2 (S p + Q^T offset)
          float* of = &sums[4 * half];
          of[0] = fmaf(k.x, k.x + twice.x, fmaf(k.y, k.y + twice.y, of[0]));
          of[1] = fmaf(k.x, shift.x, fmaf(k.y, shift.y, of[1]));
          blocks[g][half] = {k, {fmaf(0.5f, twice.x, k.x), fmaf(0.5f, twice.y, k.y)}, at};
        });
    wait_phase(exchange.projected(), 1);
    exchange.template add_parts<true>(h);
#pragma unroll
    for (int32_t g = 0; g < kOwnGroups; ++g) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const float2 k = blocks[g][half].k;
        sums[4 * half + 2] = fmaf(k.x, h[g][2 * half], fmaf(k.y, h[g][2 * half + 1], sums[4 * half + 2]));
      }
    }
    exchange.send_sums(sums);
    exchange.receive_sums(sums, parity);
    RowGradient<float> at[2];
    const float4 dots = team.dots();
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      sums[4 * half] += dots.y;
      sums[4 * half + 1] += dots.z;
      at[half] = fast_row_gradient(&sums[4 * half], dots.x, shifted);
    }

    // ---- coefficients
    uint32_t own_k[Mates::Shares::kOwnSteps][4];
#pragma unroll
    for (int32_t g = 0; g < kOwnGroups; ++g) {
      const float2 shift = load_pair(coordinates.shift + team.column_of(g));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const auto [of_grad, of_row, of_shift] = at[half];
        const auto& [k, u, mapped] = blocks[g][half];
        const float grad_a = fmaf(of_grad, h[g][2 * half], fmaf(-of_row, u.x, -of_shift * shift.x));
        const float grad_b = fmaf(of_grad, h[g][2 * half + 1], fmaf(-of_row, u.y, -of_shift * shift.y));
        const float2 back = fast_map_backward(mapped, grad_a, grad_b);
        own_k[g / 2][g % 2 * 2 + half] =
            pack<S>(fmaf(-scalar, fmaf(of_row, k.x, grad_a), back.x), fmaf(-scalar, fmaf(of_row, k.y, grad_b), back.y));
      }
    }
    exchange.send_coefficients(own_k);

    // ---- what is not in the span of Q, and out
    team.forget_addresses();
    float rows[kChunks][32];
    uint32_t vectors[2];
    team.tail().factors({-scalar * at[0].row, -scalar * at[1].row}, {-scalar * at[0].shift, -scalar * at[1].shift}, vectors);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.begin_rows(c, y[c], scalar, at, vectors, rows[c]);
    team.load_after_reading(rows_map, team.tile + team.stride, Mates::kReuse);
    wait_phase(exchange.mapped(), parity);
    team.template rebuild_rows<kChunks>(rows, own_k, 0, [] {},
                                        [&](int32_t c) { team.store_chunk(rows[c], c, arguments.grad_y, team.width, 0); });
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
