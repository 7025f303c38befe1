// The bounded update on Hopper: one read of state and deltas and one write of each row (METHOD section 4, D11).
//
//   c^ = turn(state, deltas)   step = a_v tanh(dv)   k = c^ - Q^T step (project)   w = Q k + v0 + step
//   e' = w/max(|w|, floor)     e = Norm(e' + shift)
//
// Shapes   state [N, 3M + D]; deltas [N, R + D]; out [N, D]; Q [D, R], R <= 128 and a multiple of 16, D <= 1280.
// Grid     as in sm90_correct.cuh: clusters of 2 or 4 blocks, each over tiles of 64 rows; a block has its columns of Q for good.
// A tile   1 the copy engine brings 64 rows of dv; 2 step waits in registers, as the first product's operand and for w; the next tile
//          is on its way; 3 each block collects its share of Q^T step, 4 turns its blocks of the rank and 5 hands k to the others; v0
//          comes meanwhile, straight into registers; 6 w on top of v0 + step; 7 its norms, summed from w over the cluster; 8 out.
// Order    Columns and rows of Q are shuffled (aniso/cuda_sm90.h), so that what a thread holds of a row is 16 bytes long, and
//          what it turns 8 bytes of each part of the state: rows never pass through shared memory on their way out.
// Shared   Q 16 KB a chunk of 64 columns. For each warpgroup 8 KB of dv a chunk and 26 KB that carry parts of Q^T step, then k.
// Registers  w in fp32: 32 kChunks a thread. step is rounded once, so that Q^T step is that of the step that is taken; then k and the result.
// Global   5 M + 3 D storage values a row. Between the blocks of a cluster of C go (C - 1) R (4 + 2) bytes for each row.
// FLOP     4 D R for each row; D tanh.
#pragma once

#include "sm90_exchange.cuh"

namespace aniso::sm90 {

template <typename S>
struct UpdateArguments {
  Sm90Update<S> in;
  int64_t count;
  const S* state;  // [N, 3M + D]
  int64_t state_stride;
  const S* deltas;  // [N, R + D]
  int64_t deltas_stride;
  S* out;  // [N, D]
};

// Two values of a_v tanh(dv).
template <typename S>
__device__ __forceinline__ uint32_t step_of(uint32_t move, float a_v) {
  const float2 moved = unpack<S>(move);
  return pack<S>(a_v * fast_tanh(moved.x), a_v * fast_tanh(moved.y));
}

template <typename S, int kCluster, int kChunks>
__global__ void __launch_bounds__(kWarpgroups* kWarpgroupThreads, 1)
    sm90_decode_kernel(const __grid_constant__ CUtensorMap moves_map, const __grid_constant__ CUtensorMap complement_map,
                       const __grid_constant__ CUtensorMap basis_map, const __grid_constant__ UpdateArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = Shared<kCluster, kChunks, true>;
  using Shares = Exchange<kCluster>;
  constexpr int32_t kOwnGroups = Shares::kOwnGroups, kTurnGroups = kOwnGroups / 4;  // of four blocks that lie side by side
  constexpr uint32_t kCoefficients = (kCluster - 1) * Shares::kRoundedBytes;  // after the parts
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Update<S>& in = arguments.in;
  const uint32_t shared = shared_address(shared_memory);
  const int32_t warpgroup = __shfl_sync(0xffffffffu, int32_t(threadIdx.x) / kWarpgroupThreads, 0);
  const int32_t thread = threadIdx.x % kWarpgroupThreads;
  const int32_t warp = thread / 32, lane = thread % 32, lane_row = lane / 4, quarter = lane % 4;
  const uint32_t rank = cluster_rank();
  const bool leader = thread == 0;
  const uint32_t basis = shared + Layout::kBasis;
  const uint32_t tile_memory = shared + Layout::kTiles + warpgroup * Layout::kTileBytes;
  auto& vectors = *reinterpret_cast<ColumnVectors<kChunks>*>(shared_memory + Layout::kColumns);
  const Shares exchange{shared + Layout::kExchanges + warpgroup * Layout::kExchangeBytes,
                        shared + Layout::kBarriers + warpgroup * uint32_t(sizeof(Barriers)),
                        rank, thread, warp, lane};
  const uint32_t loaded = exchange.barrier(offsetof(Barriers, loaded)), projected = exchange.barrier(offsetof(Barriers, projected));
  const uint32_t mapped = exchange.barrier(offsetof(Barriers, mapped)), summed = exchange.barrier(offsetof(Barriers, summed));
  const uint32_t exchange_free = exchange.barrier(offsetof(Barriers, exchange_free));
  const uint32_t basis_loaded = shared + Layout::kBarriers + kWarpgroups * uint32_t(sizeof(Barriers));
  const uint64_t basis_operand = narrow_operand(basis, Layout::kPanelBytes);
  const int32_t first_column = int32_t(rank) * kChunks * kChunkColumns;

  if (leader) {
    for (const uint32_t barrier : {loaded, projected, mapped, summed}) barrier_init(barrier, 1);
    barrier_init(exchange_free, (kCluster - 1) * kWarps);  // from every warp of the others
    if (warpgroup == 0) barrier_init(basis_loaded, 1);
    barrier_init_fence();
  }
  cluster_sync();

  const int64_t tiles = (arguments.count + kTileRows - 1) / kTileRows;
  const int64_t stride = int64_t(cluster_count()) * kWarpgroups;
  int64_t tile = int64_t(cluster_index()) * kWarpgroups + warpgroup;
  const auto load_tile = [&](const CUtensorMap& rows_map, int64_t which) {
    arrive_expecting(loaded, Layout::kTileBytes);
    for (int32_t c = 0; c < kChunks; ++c) {
      load_box(tile_memory + c * kTileChunkBytes, rows_map, first_column + c * kChunkColumns, int32_t(which * kTileRows), loaded);
    }
  };
  const auto load_after_reading = [&](const CUtensorMap& rows_map, int64_t which) {
    reads_before_copy_fence();
    warpgroup_sync(warpgroup);  // every thread has read the tile
    if (leader && which < tiles) load_tile(rows_map, which);
  };
  if (leader && warpgroup == 0) {
    arrive_expecting(basis_loaded, kSteps * Layout::kPanelBytes);
    for (int32_t panel = 0; panel < kSteps; ++panel) {
      for (int32_t c = 0; c < kChunks; ++c) {
        load_box(basis + panel * Layout::kPanelBytes + c * kChunkColumns * kPanelRowBytes, basis_map,
                 (int32_t(rank) * Shares::kOwnColumns + panel * kPanelColumns) % kRank, first_column + c * kChunkColumns,
                 basis_loaded);
      }
    }
  }
  if (leader && tile < tiles) load_tile(moves_map, tile);
  const bool shifted = in.shift != nullptr;
  for (int32_t j = threadIdx.x; j < kChunks * kChunkColumns; j += blockDim.x) {
    const int32_t column = first_column + j;
    vectors.shift[j] = shifted && column < in.width ? in.shift[column] : 0.f;
  }
  float shift_squares = 0.f;
  for (int32_t j = lane; shifted && j < in.width; j += 32) shift_squares += in.shift[j] * in.shift[j];
  for (int32_t step = 16; step > 0; step /= 2) shift_squares += __shfl_xor_sync(0xffffffffu, shift_squares, step);
  __syncthreads();
  wait_phase(basis_loaded, 0);

  // Of its 16 rows a warp takes two that lie four apart side by side: their pieces are in different banks.
  const int32_t first_of_warp = warp * 16 + lane_row / 2 + lane_row % 2 * 4;
  const int32_t blocks = in.rank / 2, own_columns = first_column + quarter * 8, columns_left = in.width - own_columns;
  const int32_t first_block = int32_t(rank) * (Shares::kOwnColumns / 2) + quarter * 4;

  // body(half, piece, eight neighbours) of what this thread holds of a chunk of the tile.
  const auto for_each_unit = [&](int32_t c, const auto& body) {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const int32_t row = first_of_warp + half * 8;
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        const float4 unit = load_shared(tile_memory + c * kTileChunkBytes + row * 128 + (((piece * 4 + quarter) ^ (row & 7)) * 16));
        const uint32_t packed[4] = {__float_as_uint(unit.x), __float_as_uint(unit.y), __float_as_uint(unit.z), __float_as_uint(unit.w)};
        body(half, piece, packed);
      }
    }
  };

  uint32_t parity = 0;
  for (; tile < tiles; tile += stride, parity ^= 1) {
    if (leader) {
      arrive_expecting(projected, (kCluster - 1) * Shares::kRoundedBytes);
      arrive_expecting(mapped, (kCluster - 1) * Shares::kCoefficientBytes);
      arrive_expecting(summed, (kCluster - 1) * kNormsBytes);
    }
    const int64_t first_row = tile * kTileRows + first_of_warp;

    // ---- step, and Q^T step from this block's columns
    uint32_t step[kChunks][16];  // of each chunk four operands of the product, in its order
    float own[kOwnGroups][4];
    {
      float part[64] = {};
      wait_phase(loaded, 0);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        for_each_unit(c, [&](int32_t half, int32_t piece, const uint32_t(&moves)[4]) {
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) step[c][8 * piece + 2 * i + half] = step_of<S>(moves[i], in.a_v);
        });
        pin(step[c]);
        products_begin();
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          project<S>(part, &step[c][4 * i], basis_operand + operand_offset((c * 4 + i) * 16 * kPanelRowBytes));
        }
        products_commit();
      }
      load_after_reading(complement_map, tile);
      if (tile >= stride) wait_phase(exchange_free, parity ^ 1);
      products_wait();
      pin(part);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(step[c]);
#pragma unroll
      for (int32_t i = 0; i < kOwnGroups * 4; ++i) own[i / 4][i % 4] = part[i];
      exchange.template send_rounded_parts<S>(part);
    }

    // ---- meanwhile the state comes; rows past the last are read as the last, and not written
    const S* state[2];
    const S* deltas[2];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const int64_t row = first_row + half * 8 < arguments.count ? first_row + half * 8 : arguments.count - 1;
      state[half] = arguments.state + row * arguments.state_stride;
      deltas[half] = arguments.deltas + row * arguments.deltas_stride;
    }
    uint2 polar[kTurnGroups][2][5];  // sin, cos, log rho, dtheta and drho of four blocks each
#pragma unroll
    for (int32_t t = 0; t < kTurnGroups; ++t) {
      const int32_t block = first_block + t * 16;
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
#pragma unroll
        for (int32_t i = 0; i < 5; ++i) {
          const S* from = i < 3 ? state[half] + i * blocks + block : deltas[half] + (i - 3) * blocks + block;
          polar[t][half][i] = load_half_line(from, block < blocks);
        }
      }
    }
    // ---- k of the blocks of the rank that this block collects
    wait_phase(projected, parity);
    exchange.template add_rounded_parts<S>(own);
    uint32_t own_k[1][Shares::kOwnSteps][4];
#pragma unroll
    for (int32_t g = 0; g < kOwnGroups; ++g) {
      const bool inside = first_block + g / 4 * 16 < blocks;
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const uint2(&parts)[5] = polar[g / 4][half];
        const TurnedBlock turned = turned_block(value_of<S>(parts[0], g % 4), value_of<S>(parts[1], g % 4),
                                                value_of<S>(parts[2], g % 4), value_of<S>(parts[3], g % 4),
                                                value_of<S>(parts[4], g % 4), in.a_theta, in.a_rho);
        const float a = in.project ? own[g][2 * half] : 0.f, b = in.project ? own[g][2 * half + 1] : 0.f;
        own_k[0][g / 2][g % 2 * 2 + half] = inside ? pack<S>(turned.a - a, turned.b - b) : 0;
      }
    }
    exchange.send_coefficients(own_k, kCoefficients);

    // ---- w
    float w[kChunks][32];
    wait_phase(loaded, 1);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      for_each_unit(c, [&](int32_t half, int32_t piece, const uint32_t(&kept)[4]) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float2 v0 = unpack<S>(kept[i]), moved = unpack<S>(step[c][8 * piece + 2 * i + half]);
          w[c][16 * piece + 4 * i + 2 * half] = v0.x + moved.x;
          w[c][16 * piece + 4 * i + 2 * half + 1] = v0.y + moved.y;
        }
      });
    }
    load_after_reading(moves_map, tile + stride);
    wait_phase(mapped, parity);
    uint32_t k[kSteps][4];
#pragma unroll
    for (int32_t i = 0; i < kSteps; ++i) exchange.coefficients(own_k, kCoefficients, 0, i, k[i]);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
    products_begin();
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      const uint64_t rows = basis_operand + operand_offset(c * kChunkColumns * kPanelRowBytes);
#pragma unroll
      for (int32_t i = 0; i < kSteps; ++i) rebuild<S>(w[c], k[i], rows + operand_offset(i * Layout::kPanelBytes));
      products_commit();
    }

    // ---- its norms
    const auto shifts_of = [&](int32_t c, int32_t piece, float(&shifts)[8]) {  // of eight neighbours
      const uint32_t place = shared_address(vectors.shift + c * kChunkColumns + piece * 32 + quarter * 8);
      const float4 first = load_shared(place), second = load_shared(place + 16);
      shifts[0] = first.x, shifts[1] = first.y, shifts[2] = first.z, shifts[3] = first.w;
      shifts[4] = second.x, shifts[5] = second.y, shifts[6] = second.z, shifts[7] = second.w;
    };
    float sums[4] = {};
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      products_wait(kChunks - 1 - c);
      pin(w[c]);
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        float shifts[8];
        shifts_of(c, piece, shifts);
#pragma unroll
        for (int32_t i = 0; i < 8; ++i) {
          const float* values = &w[c][16 * piece + i / 2 * 4 + i % 2];
          sums[0] = fmaf(values[0], values[0], sums[0]);
          sums[1] = fmaf(values[0], shifts[i], sums[1]);
          sums[2] = fmaf(values[2], values[2], sums[2]);
          sums[3] = fmaf(values[2], shifts[i], sums[3]);
        }
      }
    }
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) sums[i] = sum_over_row(sums[i]);
    exchange.send_sums(sums, summed);
    wait_phase(summed, parity);
    float total[4];
    exchange.total_sums(sums, total);

    // ---- out
    float factor[2], shift_factor[2];
    int32_t left[2];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const Scales scales = fast_scales(total[2 * half], total[2 * half + 1], shift_squares, shifted);
      factor[half] = scales.inverse * scales.outer;
      shift_factor[half] = scales.outer;
      left[half] = first_row + half * 8 < arguments.count ? columns_left : 0;
    }
    S* result = arguments.out + first_row * in.width + own_columns;
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        float shifts[8];
        shifts_of(c, piece, shifts);
        const int32_t column = c * kChunkColumns + piece * 32;
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          uint32_t line[4];
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) {
            const float* values = &w[c][16 * piece + 4 * i + 2 * half];
            line[i] = pack<S>(fmaf(values[0], factor[half], shifts[2 * i] * shift_factor[half]),
                              fmaf(values[1], factor[half], shifts[2 * i + 1] * shift_factor[half]));
          }
          store_line_inside(result + int64_t(half) * 8 * in.width + column, line, column < left[half]);
        }
      }
    }
    exchange.warp_tells_others(exchange_free);
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
