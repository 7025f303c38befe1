// The closed form and the encoding on Hopper: one read and one write of each row (METHOD section 4).
//
//   p = Q^T y        c_t = p + bias        w = Q T(rho) (cos, sin) + S (y - Q c_t) + offset
//   e' = w/|w|       e = Norm(e' + shift)                       S: a number, or diagonal
//   state = [sin; cos; log T(rho); S (y - Q c_t) + offset]
//
// Shapes   y, out [N, D]; state [N, 3M + D], R a multiple of 16 then; Q [D, R], R <= 128, D <= 1280; cells [M, G + 1].
// Grid     clusters of 2 or 4 blocks, as many as fit the device, each over tiles of 64 rows. Block c of a cluster owns the
//          columns [64 kChunks c, 64 kChunks (c + 1)) of its tiles and of Q, so that Q fits: it is loaded once and serves
//          both products. Warpgroups of a block work on tiles of their own and cover each other's waits.
// A tile   1 the copy engine brings 64 rows, which go into registers; 2 partial p from the block's columns; 3 each block collects its share
//          of p from the others, 4 maps its blocks of the rank and hands coefficients to the others; the next tile is on its way; 5 w;
//          6 norms, summed from w over the cluster; 7 out. A number S goes into the coefficients: k = T(rho) (cos, sin) - S c_t, w = Q k + S y +
//          offset. A diagonal one has two kinds, -c_t and T(rho) (cos, sin), and w grows in place: y, y - Q c_t, S times that + offset, w.
//          -c_t goes round while the radii are looked up.
// Shared   sm90_team.cuh, and the constants of the coordinates.
// Registers  w in fp32: 32 kChunks a thread, before that the rows at half of it. Nothing is rounded but coefficients and the result.
// Global   2 D storage values, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster
//          of C go (C - 1) R (4 + 2) bytes for each row.
// FLOP     4 D R for each row, 6 D R for the diagonal complement.
#pragma once

#include "sm90_radius.cuh"
#include "sm90_team.cuh"

namespace aniso::sm90 {

enum class Form { kScalar, kDiagonal, kState };

template <typename S>
struct CorrectArguments {
  Sm90Operands<S> in;
  int64_t count;
  S* out;  // [N, D], or states [N, 3M + D]
};

// Warpgroups of a block, as many as the registers have room for.
constexpr int32_t correct_teams(int32_t chunks) { return chunks <= 3 ? 3 : 2; }

template <typename S, int kCluster, int kChunks, Form kForm, int kTeams>
using CorrectBase =
    Team<S, Parts::kExact, kCluster, kChunks, kForm == Form::kDiagonal ? 2 : 1, kTeams, kForm == Form::kDiagonal ? 3 : 2>;

template <typename S, int kCluster, int kChunks, Form kForm, int kTeams = correct_teams(kChunks)>
struct CorrectTeam : CorrectBase<S, kCluster, kChunks, kForm, kTeams> {
  static constexpr int32_t kKinds = kForm == Form::kDiagonal ? 2 : 1;  // of coefficients, the last with T(rho) (cos, sin)
  using Base = CorrectBase<S, kCluster, kChunks, kForm, kTeams>;
  using typename Base::Shares;
  using Base::Base, Base::blocks, Base::count, Base::first_block, Base::quarter, Base::row, Base::width;
  static constexpr int32_t kOwnGroups = Shares::kOwnGroups;
  static constexpr int32_t kAhead = kForm == Form::kDiagonal && Base::kWarpgroups == 2 ? 2 : kChunks;
  // Groups whose pieces of the radius map a thread awaits at once: as many as the registers have room for.
  static constexpr int32_t kLookupGroups = 4;
  static constexpr uint32_t kBytes = Base::Layout::kOther + uint32_t(sizeof(CoordinateVectors<kCluster>));
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");

  // A chunk of what Q k is added to: S y + offset for a number S, y for a diagonal one.
  __device__ __forceinline__ void begin_rows(int32_t c, const uint32_t (&y)[16], float scalar, float (&w)[32]) const {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      float offset[8];
      if constexpr (kForm != Form::kDiagonal) this->load_vector(kOffset, c, piece, offset);
#pragma unroll
      for (int32_t i = 0; i < 8; ++i) {
        const float2 pair = unpack<S>(y[8 * piece + i]);
        const int32_t at = 16 * piece + 2 * i, column = i / 2 * 2;
        w[at] = kForm == Form::kDiagonal ? pair.x : fmaf(scalar, pair.x, offset[column]);
        w[at + 1] = kForm == Form::kDiagonal ? pair.y : fmaf(scalar, pair.y, offset[column + 1]);
      }
    }
  }

  // A chunk of S w + offset.
  __device__ __forceinline__ void scale_rows(int32_t c, float (&w)[32]) const {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      float offset[8], scale[8];
      this->load_vector(kOffset, c, piece, offset);
      this->load_vector(kScale, c, piece, scale);
#pragma unroll
      for (int32_t i = 0; i < 16; ++i) {
        const int32_t column = i / 4 * 2 + i % 2;
        w[16 * piece + i] = fmaf(scale[column], w[16 * piece + i], offset[column]);
      }
    }
  }

  // -c_t of groups of this block's share, to the others at once.
  __device__ __forceinline__ void send_complement(const CoordinateVectors<kCluster>& coordinates, const float (&own)[kOwnGroups][4],
                                                  int32_t first, uint32_t (&k)[Shares::kOwnSteps][4]) const {
#pragma unroll
    for (int32_t g = first; g < first + kLookupGroups; ++g) {
      const float2 target = load_pair(coordinates.scaled_target + column_of(g));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        k[g / 2][g % 2 * 2 + half] = pack<S>(target.x - own[g][2 * half], target.y - own[g][2 * half + 1]);
      }
    }
    this->exchange.send_coefficients(k, 0, first / 2, (first + kLookupGroups) / 2);
  }

  // Of the share, where the pair of a group of this thread's columns lies.
  __device__ __forceinline__ int32_t column_of(int32_t g) const { return g / 4 * 32 + quarter * 8 + g % 4 * 2; }

  // Coefficients of this block's share from its coordinates. A state's polar part is written on the way.
  __device__ __forceinline__ void map_share(const Sm90Operands<S>& in, const CoordinateVectors<kCluster>& coordinates, float scalar,
                                            float (&own)[kOwnGroups][4], uint32_t (&k)[kKinds][Shares::kOwnSteps][4], S* states) const {
    const auto place = [&](int32_t g) { return column_of(g); };
#pragma unroll
    for (int32_t first = 0; first < kOwnGroups; first += kLookupGroups) {
      BlockLookup lookups[kLookupGroups][2];
      float radii[kLookupGroups][2];
      map_radii<kLookupGroups>(in, coordinates, int32_t(cluster_rank()) * Shares::kOwnColumns, first, place, own, lookups, radii, [&] {
        if constexpr (kForm == Form::kDiagonal) send_complement(coordinates, own, first, k[0]);
      });
      float polar[2][3][kLookupGroups];  // sin, cos and log T(rho) of both rows
#pragma unroll
      for (int32_t i = 0; i < kLookupGroups; ++i) {
        const int32_t g = first + i;
        float2 target = {};
        if constexpr (kForm != Form::kDiagonal) target = load_pair(coordinates.scaled_target + column_of(g));
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const float a = own[g][2 * half], b = own[g][2 * half + 1], radius = radii[i][half];
          const auto [cos, sin] = direction_of(lookups[i][half], a, b);
          const int32_t step = g / 2, operand = g % 2 * 2 + half;
          // c_t = (a, b) - t, times S if that is a number
          if constexpr (kForm == Form::kScalar) {
            k[0][step][operand] = pack<S>(fmaf(radius, cos, fmaf(-scalar, a, target.x)), fmaf(radius, sin, fmaf(-scalar, b, target.y)));
          } else if constexpr (kForm == Form::kDiagonal) {
            k[1][step][operand] = pack<S>(radius * cos, radius * sin);
          } else {
            k[0][step][operand] = pack<S>(fmaf(-scalar, a, target.x), fmaf(-scalar, b, target.y));
            polar[half][0][i] = sin, polar[half][1][i] = cos, polar[half][2][i] = logf(radius);
          }
        }
      }
      if constexpr (kForm == Form::kState) {
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const int32_t block = first_block + first / 4 * 16;
          S* state = states + row(half) * (3 * blocks + width) + block;
#pragma unroll
          for (int32_t i = 0; i < 3; ++i) {
            const float(&of)[kLookupGroups] = polar[half][i];
            store_half_line_inside(state + i * blocks, pack<S>(of[0], of[1]), pack<S>(of[2], of[3]), block < blocks && row(half) < count);
          }
        }
      }
    }
  }
};

template <typename S, int kCluster, int kChunks, Form kForm>
__global__ void __launch_bounds__(CorrectTeam<S, kCluster, kChunks, kForm>::kThreads, 1)
    sm90_correct_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                        const __grid_constant__ CorrectArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = CorrectTeam<S, kCluster, kChunks, kForm>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.count);
  const auto& exchange = team.exchange;
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Mates::Layout::kOther);
  constexpr uint32_t kLast = Mates::kKinds - 1;
  const bool shifted = in.shift != nullptr;
  const float scalar = kForm == Form::kDiagonal ? 1.f : in.scale[0];
  team.begin(basis_map, rows_map);
  team.keep_vector(kShift, in.shift);
  team.keep_vector(kOffset, in.offset);
  if (kForm == Form::kDiagonal) team.keep_vector(kScale, in.scale);
  fill(coordinates, in, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns);
  team.end_of_beginning();
  const float shift_squares = dot_of(in.shift, in.shift, in.width, team.lane);

  uint32_t parity = 0;
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_coefficients();
      if (kForm != Form::kState) exchange.expect_sums(4);
    }

    // ---- p from this block's columns
    uint32_t y[kChunks][16];  // operands of the product
    float own[Mates::kOwnGroups][4];
    wait_phase(team.loaded(), parity);
    team.project_and_send(y, own, [](uint32_t pair) { return pair; }, [&] { team.wait_for_last_tile(parity); });

    // ---- the share of the rank that this block maps
    team.forget_addresses();
    wait_phase(exchange.projected(), parity);
    exchange.add_parts(own);
    uint32_t own_k[Mates::kKinds][Mates::Shares::kOwnSteps][4];
    team.map_share(in, coordinates, scalar, own, own_k, arguments.out);
    exchange.send_coefficients(own_k[kLast], kLast);

    // ---- w
    team.forget_addresses();
    float w[kChunks][32], sums[4] = {};
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.begin_rows(c, y[c], scalar, w[c]);
    // A loop indeed: side by side, its passes would keep the operands' addresses in common, and have no registers for them.
#pragma unroll 1
    for (uint32_t kind = 0; kind <= kLast; ++kind) {
      if (kind == 0) {
        wait_phase(exchange.mapped(0), parity);
      } else {
        wait_phase(exchange.mapped(kLast), parity);
#pragma unroll
        for (int32_t i = 0; i < Mates::Shares::kOwnSteps * 4; ++i) own_k[0][i / 4][i % 4] = own_k[kLast][i / 4][i % 4];
      }
      const auto load_next = [&] {  // the coefficients lay in the tile
        if (kind == kLast) team.load_after_reading(rows_map, team.tile + team.stride);
      };
      team.template rebuild_rows<Mates::kAhead>(w, own_k[0], kind, load_next, [&](int32_t c) {
        if (kind < kLast) {
          team.scale_rows(c, w[c]);
        } else if constexpr (kForm == Form::kState) {
          team.store_chunk(w[c], c, arguments.out, 3 * team.blocks + team.width, 3 * team.blocks);
        } else {
          team.add_squares(w[c], c, sums);
        }
      });
    }

    // ---- out
    if constexpr (kForm != Form::kState) {
      exchange.send_sums(sums);
      exchange.receive_sums(sums, parity);
      Scales scales[2];
      fast_scales(sums, shift_squares, shifted, scales);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) team.store_unit_rows(w[c], c, scales, arguments.out);
    }
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
