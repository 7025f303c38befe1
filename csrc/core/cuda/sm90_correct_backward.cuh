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
// A tile   1 y comes, waits in registers, and is multiplied; t is on its way; 2 each block collects its share of p and asks for the cells
//          of its radius maps; 3 t is multiplied, and stays in the tile; 4 each block collects its share of h; 5 four sums a row, over the
//          cluster; 6 each block hands coefficients to the others; meanwhile y and t become what is not in the span of Q, and y of the next
//          tile is on its way; 7 out.
// Shared   as in sm90_encode_backward.cuh, the offset and the shift.
// Registers  y at half of what the result takes in fp32, 32 kChunks a thread; t is read from the tile wherever it is needed.
// Global   3 D storage values a row, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster
//          of C go (C - 1) R (4 + 2 + 2) bytes for each row.
// FLOP     6 D R for each row.
#pragma once

#include "sm90_gradient.cuh"

namespace aniso::sm90 {

template <typename S>
struct CorrectGradientArguments {
  Sm90Operands<S> in;
  int64_t count;
  S* grad_y;  // [N, D]
};

template <typename S, int kCluster, int kChunks>
struct CorrectGradientTeam : Team<S, Parts::kExactThenRounded, kCluster, kChunks, 1, 2, 2> {
  using Base = Team<S, Parts::kExactThenRounded, kCluster, kChunks, 1, 2, 2>;
  using typename Base::Shares;
  using Base::Base;
  static constexpr int32_t kOwnGroups = Shares::kOwnGroups;
  static constexpr Reuse kReuse = Reuse::kUnknown;
  static constexpr uint32_t kBytes = Base::Layout::kOther + uint32_t(sizeof(CoordinateVectors<kCluster>));
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");

  // What the rows themselves contribute to four sums of each: y.S (S y + 2 offset), S y.shift, t.(S y + offset) and t.shift; t is in the tile.
  __device__ __forceinline__ void sums_of_rows(const uint32_t (&y)[kChunks][16], float scalar, float (&sums)[8]) const {
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      this->for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&grads)[4]) {
        float offset[8], shift[8];
        this->load_vector(kOffset, c, piece, offset);
        this->load_vector(kShift, c, piece, shift);
        float* of = &sums[4 * half];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float2 grads_of = unpack<S>(grads[i]), row = unpack<S>(y[c][8 * piece + 2 * i + half]);
          const auto add = [&](float grad, float row, float offset, float shift) {
            const float kept = fmaf(scalar, row, offset);
            of[0] = fmaf(row, kept + offset, of[0]);
            of[1] = fmaf(row, shift, of[1]);
            of[2] = fmaf(grad, kept, of[2]);
            of[3] = fmaf(grad, shift, of[3]);
          };
          add(grads_of.x, row.x, offset[2 * i], shift[2 * i]);
          add(grads_of.y, row.y, offset[2 * i + 1], shift[2 * i + 1]);
        }
      });
    }
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) sums[4 * half] *= scalar, sums[4 * half + 1] *= scalar;
  }

  // What a block of the rank contributes, of one row: body(group, half, mapped block, k, 2 (S p + Q^T offset), Q^T shift).
  template <typename Body>
  __device__ __forceinline__ void for_each_coefficient(const Sm90Operands<S>& in, const CoordinateVectors<kCluster>& coordinates, float scalar,
                                                       const uint32_t (&cells)[kOwnGroups][2], float (&own)[kOwnGroups][4],
                                                       const Body& body) const {
    for_each_mapped(
        in, coordinates, int32_t(cluster_rank()) * Shares::kOwnColumns, [&](int32_t g) { return this->column_of(g); }, own, cells,
        [&](int32_t g, int32_t half, const MappedBlock& at) {
          const int32_t column = this->column_of(g);
          const float2 target = load_pair(coordinates.scaled_target + column), cross = load_pair(coordinates.cross + column);
          const float a = own[g][2 * half], b = own[g][2 * half + 1];
          const float2 k = {fmaf(at.radius, at.cos, fmaf(-scalar, a, target.x)), fmaf(at.radius, at.sin, fmaf(-scalar, b, target.y))};
          body(g, half, at, k, make_float2(fmaf(2.f * scalar, a, cross.x), fmaf(2.f * scalar, b, cross.y)),
               load_pair(coordinates.shift + column));
        });
  }

  // A chunk of S (alpha t - beta (S y + offset) - gamma shift); t is in the tile.
  __device__ __forceinline__ void begin_rows(int32_t c, const uint32_t (&y)[16], float scalar, const RowGradient<float> (&at)[2],
                                             float (&w)[32]) const {
    this->for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&grads)[4]) {
      float offset[8], shift[8];
      this->load_vector(kOffset, c, piece, offset);
      this->load_vector(kShift, c, piece, shift);
      const float of_grad = scalar * at[half].grad, of_row = -scalar * at[half].row, of_shift = -scalar * at[half].shift;
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const float2 grad = unpack<S>(grads[i]), row = unpack<S>(y[8 * piece + 2 * i + half]);
        const auto value = [&](float grad, float row, float offset, float shift) {
          return fmaf(of_grad, grad, fmaf(of_row, fmaf(scalar, row, offset), of_shift * shift));
        };
        w[16 * piece + 4 * i + 2 * half] = value(grad.x, row.x, offset[2 * i], shift[2 * i]);
        w[16 * piece + 4 * i + 2 * half + 1] = value(grad.y, row.y, offset[2 * i + 1], shift[2 * i + 1]);
      }
    });
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
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Mates::Layout::kOther);
  const float scalar = in.scale[0];
  const bool shifted = in.shift != nullptr;
  team.begin(basis_map, rows_map);
  team.keep_vector(kShift, in.shift);
  team.keep_vector(kOffset, in.offset);
  fill(coordinates, in, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns);
  team.end_of_beginning();
  const float shift_squares = dot_of(in.shift, in.shift, in.width, team.lane);
  const float offset_squares = dot_of(in.offset, in.offset, in.width, team.lane);
  const float offset_shift = dot_of(in.offset, in.shift, in.width, team.lane);

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
    collect_coordinates(team, in, coordinates, grad_map, y, own, cells, [] {});

    // ---- h
    team.forget_addresses();
    float h[kOwnGroups][4];
    wait_phase(team.loaded(), 1);
    team.template project_standing_and_send<true>(h, [&] { wait_phase(exchange.free(), 0); });
    float sums[8] = {};  // of each row |w|^2, w.shift, w.t and t.shift
    team.sums_of_rows(y, scalar, sums);
    team.forget_addresses();
    wait_phase(exchange.projected(), 1);
    exchange.template add_parts<true>(h);

    // ---- the norms and products of w, and their gradient
    team.for_each_coefficient(in, coordinates, scalar, cells, own,
                              [&](int32_t g, int32_t half, const MappedBlock&, float2 k, float2 twice, float2 shift) {
                                float* of = &sums[4 * half];
                                of[0] = fmaf(k.x, k.x + twice.x, fmaf(k.y, k.y + twice.y, of[0]));
                                of[1] = fmaf(k.x, shift.x, fmaf(k.y, shift.y, of[1]));
                                of[2] = fmaf(k.x, h[g][2 * half], fmaf(k.y, h[g][2 * half + 1], of[2]));
                              });
    exchange.send_sums(sums);
    exchange.receive_sums(sums, parity);
    RowGradient<float> at[2];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      sums[4 * half] += offset_squares;
      sums[4 * half + 1] += offset_shift;
      at[half] = fast_row_gradient(&sums[4 * half], shift_squares, shifted);
    }

    // ---- coefficients
    uint32_t own_k[Mates::Shares::kOwnSteps][4];
    team.for_each_coefficient(
        in, coordinates, scalar, cells, own,
        [&](int32_t g, int32_t half, const MappedBlock& block, float2 k, float2 twice, float2 shift) {
          const auto [of_grad, of_row, of_shift] = at[half];
          const float grad_a = fmaf(of_grad, h[g][2 * half], fmaf(-of_row, fmaf(0.5f, twice.x, k.x), -of_shift * shift.x));
          const float grad_b = fmaf(of_grad, h[g][2 * half + 1], fmaf(-of_row, fmaf(0.5f, twice.y, k.y), -of_shift * shift.y));
          const float2 back = fast_map_backward(block, grad_a, grad_b);
          own_k[g / 2][g % 2 * 2 + half] =
              pack<S>(fmaf(-scalar, fmaf(of_row, k.x, grad_a), back.x), fmaf(-scalar, fmaf(of_row, k.y, grad_b), back.y));
        });
    exchange.send_coefficients(own_k);

    // ---- what is not in the span of Q, and out
    team.forget_addresses();
    float rows[kChunks][32];
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.begin_rows(c, y[c], scalar, at, rows[c]);
    team.load_after_reading(rows_map, team.tile + team.stride);
    wait_phase(exchange.mapped(), parity);
    team.template rebuild_rows<kChunks>(rows, own_k, 0, [] {},
                                        [&](int32_t c) { team.store_chunk(rows[c], c, arguments.grad_y, team.width, 0); });
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
