// A warpgroup of a Hopper kernel whose rows stay in registers: what it holds of a tile of 64 rows, and how it loads, multiplies and
// writes that.
//
// Order    Columns and rows of Q are shuffled (aniso/cuda_sm90.h). So the fragment of a product that a thread holds is, of two rows eight
//          apart, 16 neighbouring bytes in each half of every chunk of 64 columns, a `piece`; and of the rank, blocks side by side in fours.
//          Rows go from the tile that the copy engine brings into registers, multiply from there, and leave from there.
// Shared   Q stays: 16 KB a chunk of 64 columns. For each warpgroup a tile, 8 KB a chunk, which one load after another fills, and an
//          exchange. Rows do not come straight into registers, as such loads wait for room in the little that is left of the first-level cache.
#pragma once

#include "aniso/turn.h"
#include "sm90_exchange.cuh"

namespace aniso::sm90 {

template <typename S, int kCluster, int kChunks>
struct TeamShared {
  static constexpr uint32_t kPanelBytes = kChunks * kChunkColumns * kPanelRowBytes;
  static constexpr uint32_t kTileBytes = kChunks * kTileChunkBytes;
  static constexpr uint32_t kBasis = 0;
  static constexpr uint32_t kTiles = kSteps * kPanelBytes;
  static constexpr uint32_t kExchanges = kTiles + kWarpgroups * kTileBytes;
  static constexpr uint32_t kShift = kExchanges + kWarpgroups * Exchange<S, kCluster>::kBytes;  // [64 kChunks], zero past D
  static constexpr uint32_t kBarriers = kShift + kChunks * kChunkColumns * uint32_t(sizeof(float));
  static constexpr uint32_t kBasisLoaded = kBarriers + kWarpgroups * uint32_t(sizeof(Barriers));
  static constexpr uint32_t kBytes = kBasisLoaded + uint32_t(sizeof(uint64_t));
  static_assert(kTiles % 1024 == 0, "the swizzle of a tile repeats every 1024 bytes");
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");
};

// Of two rows, four blocks of the rank side by side: sin, cos, log rho, dtheta and drho.
struct PolarFours {
  uint2 of[2][5];
};

template <typename S, int kCluster, int kChunks>
struct Team {
  using Layout = TeamShared<S, kCluster, kChunks>;
  using Shares = Exchange<S, kCluster>;
  static constexpr int32_t kTurnGroups = Shares::kOwnGroups / 4;  // of four blocks side by side

  uint32_t shared;
  int32_t warpgroup, lane, quarter;
  bool leader;
  int32_t width, blocks;
  int32_t first_column;   // of this block of the cluster
  int32_t own_column;     // the first of this thread
  int32_t columns_left;   // from there
  int32_t first_of_warp;  // the first of this thread's rows in a tile. Of 16 a warp takes two that are four apart side by side: their pieces
                          // are in different banks.
  int32_t first_block;    // of the rank, of those that this thread turns
  int64_t count, tiles, stride, tile;
  uint64_t basis;
  Shares exchange;

  __device__ __forceinline__ Team(unsigned char* shared_memory, int32_t width, int32_t rank, int64_t count)
      : shared(shared_address(shared_memory)),
        // Told to be the same in a warp: the compiler overlaps products only where it knows that control flow is.
        warpgroup(__shfl_sync(0xffffffffu, int32_t(threadIdx.x) / kWarpgroupThreads, 0)),
        lane(threadIdx.x % 32),
        quarter(lane % 4),
        leader(threadIdx.x % kWarpgroupThreads == 0),
        width(width),
        blocks(rank / 2),
        first_column(int32_t(cluster_rank()) * kChunks * kChunkColumns),
        own_column(first_column + quarter * 8),
        columns_left(width - own_column),
        first_of_warp(threadIdx.x % kWarpgroupThreads / 32 * 16 + lane / 8 + lane / 4 % 2 * 4),
        first_block(int32_t(cluster_rank()) * (Shares::kOwnColumns / 2) + quarter * 4),
        count(count),
        tiles((count + kTileRows - 1) / kTileRows),
        stride(int64_t(cluster_count()) * kWarpgroups),
        tile(int64_t(cluster_index()) * kWarpgroups + warpgroup),
        basis(narrow_operand(shared + Layout::kBasis, Layout::kPanelBytes)),
        exchange{shared + Layout::kExchanges + warpgroup * Shares::kBytes,
                 shared + Layout::kBarriers + warpgroup * uint32_t(sizeof(Barriers)), cluster_rank(),
                 int32_t(threadIdx.x) % kWarpgroupThreads, int32_t(threadIdx.x) % kWarpgroupThreads / 32, lane} {}

  __device__ __forceinline__ uint32_t tile_memory() const { return shared + Layout::kTiles + warpgroup * Layout::kTileBytes; }
  __device__ __forceinline__ uint32_t loaded() const { return exchange.barrier(offsetof(Barriers, loaded)); }
  __device__ __forceinline__ bool is_first() const { return tile < stride; }

  // For the next tile. What follows from these numbers is then made where it is used: kept over the tiles, it would push rows out of the
  // registers, into a first-level cache that has no room.
  __device__ __forceinline__ void forget_addresses() {
    asm volatile("" : "+r"(shared), "+r"(exchange.memory), "+r"(exchange.barriers), "+r"(exchange.rank), "+r"(exchange.thread));
    asm volatile("" : "+r"(first_of_warp), "+r"(quarter), "+r"(own_column), "+r"(first_block), "+r"(width), "+r"(blocks));
  }

  // Barriers, this block's part of Q and of the shift, and the first load.
  __device__ __forceinline__ void begin(const CUtensorMap& basis_map, const CUtensorMap& rows_map, const float* shift) const {
    const uint32_t basis_loaded = shared + Layout::kBasisLoaded;
    if (leader) {
      for (const uint32_t barrier : {loaded(), exchange.projected(), exchange.mapped(), exchange.summed()}) barrier_init(barrier, 1);
      barrier_init(exchange.free(), (kCluster - 1) * kWarps);  // from every warp of the others
      if (warpgroup == 0) barrier_init(basis_loaded, 1);
      barrier_init_fence();
    }
    cluster_sync();
    if (leader && warpgroup == 0) {
      arrive_expecting(basis_loaded, kSteps * Layout::kPanelBytes);
      for (int32_t panel = 0; panel < kSteps; ++panel) {
        for (int32_t c = 0; c < kChunks; ++c) {
          load_box(shared + Layout::kBasis + panel * Layout::kPanelBytes + c * kChunkColumns * kPanelRowBytes, basis_map,
                   (int32_t(cluster_rank()) * Shares::kOwnColumns + panel * kPanelColumns) % kRank, first_column + c * kChunkColumns,
                   basis_loaded);
        }
      }
    }
    load(rows_map, tile);
    for (int32_t j = threadIdx.x; j < kChunks * kChunkColumns; j += blockDim.x) {
      const int32_t column = first_column + j;
      store_shared(shared + Layout::kShift + j * 4, shift != nullptr && column < width ? shift[column] : 0.f);
    }
    __syncthreads();
    wait_phase(basis_loaded, 0);
  }

  __device__ __forceinline__ void load(const CUtensorMap& rows_map, int64_t which) const {
    if (!leader || which >= tiles) return;
    arrive_expecting(loaded(), Layout::kTileBytes);
    for (int32_t c = 0; c < kChunks; ++c) {
      load_box(tile_memory() + c * kTileChunkBytes, rows_map, first_column + c * kChunkColumns, int32_t(which * kTileRows), loaded());
    }
  }

  // Over a tile that every thread has read.
  __device__ __forceinline__ void load_after_reading(const CUtensorMap& rows_map, int64_t which) const {
    reads_before_copy_fence();
    warpgroup_sync(warpgroup);
    load(rows_map, which);
  }

  // body(half, piece, eight neighbours in four pairs): what this thread holds of a chunk of the tile.
  template <typename Body>
  __device__ __forceinline__ void for_each_piece(int32_t c, const Body& body) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const int32_t row = first_of_warp + half * 8;
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        uint32_t pairs[4];
        load_shared(tile_memory() + c * kTileChunkBytes + row * 128 + (((piece * 4 + quarter) ^ (row & 7)) * 16), pairs);
        body(half, piece, pairs);
      }
    }
  }

  // Eight neighbours of the shift.
  __device__ __forceinline__ void load_shift(int32_t c, int32_t piece, float (&shift)[8]) const {
    const uint32_t place = shared + Layout::kShift + (c * kChunkColumns + piece * 32 + quarter * 8) * 4;
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const float4 four = load_shared(place + i * 16);
      shift[4 * i] = four.x, shift[4 * i + 1] = four.y, shift[4 * i + 2] = four.z, shift[4 * i + 3] = four.w;
    }
  }

  // A thread's first row, and the line of one of its two as far as it is there: one past the last is read as the last.
  __device__ __forceinline__ int64_t row(int32_t half) const { return tile * kTileRows + first_of_warp + half * 8; }
  __device__ __forceinline__ int64_t readable_row(int32_t half) const { return row(half) < count ? row(half) : count - 1; }

  // Four pairs of a row that begins at `line`, into memory.
  __device__ __forceinline__ void store_piece(S* line, int32_t half, int32_t c, int32_t piece, const uint32_t (&pairs)[4]) const {
    const int32_t column = c * kChunkColumns + piece * 32;
    store_line_inside(line + own_column + column, pairs, column < columns_left && row(half) < count);
  }

  // part += rows of a chunk, in registers, times Q.
  __device__ __forceinline__ void project_chunk(float (&part)[64], int32_t c, const uint32_t (&rows)[16]) const {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) project<S>(part, &rows[4 * i], basis + operand_offset((c * 4 + i) * 16 * kPanelRowBytes));
  }

  // sums += Q k in the columns of a chunk.
  __device__ __forceinline__ void rebuild_chunk(float (&sums)[32], int32_t c, const uint32_t (&k)[kSteps][4]) const {
#pragma unroll
    for (int32_t i = 0; i < kSteps; ++i) {
      rebuild<S>(sums, k[i], basis + operand_offset(c * kChunkColumns * kPanelRowBytes + i * Layout::kPanelBytes));
    }
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
