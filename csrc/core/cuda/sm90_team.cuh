// A warpgroup of a Hopper kernel whose rows stay in registers: what it holds of a tile of 64 rows, and how it loads, multiplies and
// writes that.
//
// Order    Columns and rows of Q are shuffled (aniso/cuda_sm90.h). So the fragment of a product that a thread holds is, of two rows eight
//          apart, 16 neighbouring bytes in each half of every chunk of 64 columns, a `piece`; and of the rank, blocks side by side in fours.
//          Rows go from the tile that the copy engine brings into registers, multiply from there, and leave from there.
// Shared   Q stays: 16 KB a chunk of 64 columns. For each warpgroup a tile, 8 KB a chunk, which one load after another fills, and an
//          exchange. Rows do not come straight into registers, as such loads wait for room in the little that is left of the first-level cache.
#pragma once

#include "sm90_exchange.cuh"

namespace aniso::sm90 {

// Whether a tile is read again: what the second-level cache is told.
enum class Reuse { kUnknown, kSoon, kNever };

enum Vector { kShift, kOffset, kScale };  // [64 kChunks] in shared memory, zero past D

template <typename Shares, int kChunks, int kWarpgroups, int kVectors, bool kByChunk>
struct TeamShared {
  static constexpr uint32_t kPanelBytes = kChunks * kChunkColumns * kPanelRowBytes;
  static constexpr uint32_t kTileBytes = kChunks * kTileChunkBytes;
  static constexpr uint32_t kBasis = 0;
  static constexpr uint32_t kTiles = kSteps * kPanelBytes;
  static constexpr uint32_t kExchanges = kTiles + kWarpgroups * kTileBytes;
  static constexpr uint32_t kVectorBytes = kChunks * kChunkColumns * uint32_t(sizeof(float));
  static constexpr uint32_t kFirstVector = kExchanges + kWarpgroups * Shares::kBytes;
  static constexpr uint32_t kBarriers = kFirstVector + kVectors * kVectorBytes;
  static constexpr uint32_t kBasisLoaded = kBarriers + kWarpgroups * Shares::kBarrierBytes;
  static constexpr uint32_t kChunksLoaded = kBasisLoaded + uint32_t(sizeof(uint64_t));
  // What else a kernel keeps begins here.
  static constexpr uint32_t kOther = kChunksLoaded + (kByChunk ? kWarpgroups * kChunks * uint32_t(sizeof(uint64_t)) : 0);
  static_assert(kTiles % 1024 == 0, "the swizzle of a tile repeats every 1024 bytes");
};

// kParts and kKinds as in Exchange. kTeams: the warpgroups of a block, as many as the registers have room for. kVectors: how many of Vector there
// are. kByChunk: each chunk of a tile has a barrier of its own for its loads. Index: of a tile; a register less where 32 bits are enough.
template <typename S, Parts kParts, int kCluster, int kChunks, int kKinds, int kTeams, int kVectors, bool kByChunk = false,
          typename Index = int64_t>
struct Team {
  using Shares = Exchange<S, kParts, kCluster, kKinds>;
  static constexpr int32_t kWarpgroups = kTeams, kThreads = kTeams * kWarpgroupThreads;
  using Layout = TeamShared<Shares, kChunks, kWarpgroups, kVectors, kByChunk>;
  static_assert(!Shares::kInTile || (kCluster - 1) * kKinds * Shares::kOwnSteps <= 4 * kChunks, "coefficients overflow a tile");
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
  int64_t count;
  Index tiles, stride, tile;
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
        tiles(Index((count + kTileRows - 1) / kTileRows)),
        stride(Index(cluster_count()) * kWarpgroups),
        tile(Index(cluster_index()) * kWarpgroups + warpgroup),
        basis(narrow_operand(shared + Layout::kBasis, Layout::kPanelBytes)),
        exchange{shared + Layout::kExchanges + warpgroup * Shares::kBytes, shared + Layout::kTiles + warpgroup * Layout::kTileBytes,
                 shared + Layout::kBarriers + warpgroup * Shares::kBarrierBytes, cluster_rank(),
                 int32_t(threadIdx.x) % kWarpgroupThreads, int32_t(threadIdx.x) % kWarpgroupThreads / 32, lane} {}

  __device__ __forceinline__ uint32_t loaded() const { return exchange.loaded(); }
  __device__ __forceinline__ uint32_t loaded(int32_t c) const {
    return shared + Layout::kChunksLoaded + (warpgroup * kChunks + c) * uint32_t(sizeof(uint64_t));
  }
  __device__ __forceinline__ bool is_first() const { return tile < stride; }

  // For the next tile. What follows from these numbers is then made where it is used: kept over the tiles, it would push rows out of the
  // registers, into a first-level cache that has no room.
  __device__ __forceinline__ void forget_addresses() {
    asm volatile("" : "+r"(shared), "+r"(exchange.memory), "+r"(exchange.tile), "+r"(exchange.barriers), "+r"(exchange.rank), "+r"(exchange.thread));
    asm volatile("" : "+r"(first_of_warp), "+r"(quarter), "+r"(own_column), "+r"(first_block), "+r"(width), "+r"(blocks));
  }

  // The same, and even these numbers are made again, from three of them: for the kernels that have the least registers to spare.
  __device__ __forceinline__ void remake_addresses() {
    asm volatile("" : "+r"(shared), "+r"(exchange.thread), "+r"(exchange.rank));
    const int32_t thread = exchange.thread, rank = int32_t(exchange.rank);
    lane = exchange.lane = thread % 32;
    exchange.warp = thread / 32;
    leader = thread == 0;
    quarter = lane % 4;
    first_column = rank * kChunks * kChunkColumns;
    own_column = first_column + quarter * 8;
    columns_left = width - own_column;
    first_of_warp = thread / 32 * 16 + lane / 8 + lane / 4 % 2 * 4;
    first_block = rank * (Shares::kOwnColumns / 2) + quarter * 4;
    exchange.memory = shared + Layout::kExchanges + warpgroup * Shares::kBytes;
    exchange.tile = shared + Layout::kTiles + warpgroup * Layout::kTileBytes;
    exchange.barriers = shared + Layout::kBarriers + warpgroup * Shares::kBarrierBytes;
    basis = narrow_operand(shared + Layout::kBasis, Layout::kPanelBytes);
  }

  // Barriers, this block's part of Q, and the first load. Afterwards end_of_beginning().
  __device__ __forceinline__ void begin(const CUtensorMap& basis_map, const CUtensorMap& rows_map) const {
    begin_basis(basis_map);
    load(rows_map, tile);
  }

  __device__ __forceinline__ void begin_basis(const CUtensorMap& basis_map) const {
    const uint32_t basis_loaded = shared + Layout::kBasisLoaded;
    if (leader) {
      for (const uint32_t barrier : {loaded(), exchange.projected(), exchange.mapped(), exchange.summed()}) barrier_init(barrier, 1);
      for (uint32_t kind = 1; kind < kKinds; ++kind) barrier_init(exchange.mapped(kind), 1);
      barrier_init(exchange.free(), (kCluster - 1) * kWarps);  // from every warp of the others
      if constexpr (kByChunk) {
        for (int32_t c = 0; c < kChunks; ++c) barrier_init(loaded(c), 1);
      }
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
  }

  // This block's part of a vector [D], or of none.
  __device__ __forceinline__ void keep_vector(Vector which, const float* values) const {
    for (int32_t j = threadIdx.x; j < kChunks * kChunkColumns; j += blockDim.x) {
      const int32_t column = first_column + j;
      store_shared(vector_place(which) + j * 4, values != nullptr && column < width ? values[column] : 0.f);
    }
  }

  __device__ __forceinline__ void end_of_beginning() const {
    __syncthreads();
    wait_phase(shared + Layout::kBasisLoaded, 0);
  }

  __device__ __forceinline__ void load(const CUtensorMap& rows_map, Index which, Reuse reuse = Reuse::kUnknown) const {
    if constexpr (kByChunk) {
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) load(rows_map, which, c, reuse);
      return;
    }
    if (!leader || which >= tiles) return;
    arrive_expecting(loaded(), Layout::kTileBytes);
    for (int32_t c = 0; c < kChunks; ++c) load_chunk_of(rows_map, which, c, reuse, loaded());
  }

  __device__ __forceinline__ void load(const CUtensorMap& rows_map, Index which, int32_t c, Reuse reuse) const {
    if (!leader || which >= tiles) return;
    arrive_expecting(loaded(c), kTileChunkBytes);
    load_chunk_of(rows_map, which, c, reuse, loaded(c));
  }

  __device__ __forceinline__ void load_chunk_of(const CUtensorMap& rows_map, Index which, int32_t c, Reuse reuse, uint32_t barrier) const {
    const uint32_t place = exchange.tile + c * kTileChunkBytes;
    const int32_t column = first_column + c * kChunkColumns, row = int32_t(which * kTileRows);
    if (reuse == Reuse::kUnknown) {
      load_box(place, rows_map, column, row, barrier);
    } else {
      load_box(place, rows_map, column, row, barrier, reuse == Reuse::kSoon ? evicted_last() : evicted_first());
    }
  }

  // Over chunk c, which every thread has read; or once the last has been read over them all.
  __device__ __forceinline__ void load_after_reading(const CUtensorMap& rows_map, Index which, int32_t c, Reuse reuse, bool each) const {
    if (!each && c + 1 < kChunks) return;
    reads_before_copy_fence();
    warpgroup_sync(warpgroup);
    for (int32_t i = each ? c : 0; i <= c; ++i) load(rows_map, which, i, reuse);
  }

  // What will be loaded next, into the second-level cache.
  __device__ __forceinline__ void prefetch(const CUtensorMap& rows_map, Index which) const {
    if (!leader || which >= tiles) return;
    for (int32_t c = 0; c < kChunks; ++c) prefetch_box(rows_map, first_column + c * kChunkColumns, int32_t(which * kTileRows));
  }

  // Over a tile that every thread has read.
  __device__ __forceinline__ void load_after_reading(const CUtensorMap& rows_map, Index which, Reuse reuse = Reuse::kUnknown) const {
    reads_before_copy_fence();
    warpgroup_sync(warpgroup);
    load(rows_map, which, reuse);
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
        load_shared(exchange.tile + c * kTileChunkBytes + row * 128 + (((piece * 4 + quarter) ^ (row & 7)) * 16), pairs);
        body(half, piece, pairs);
      }
    }
  }

  __device__ __forceinline__ uint32_t vector_place(Vector which) const {
    return shared + Layout::kFirstVector + uint32_t(which) * Layout::kVectorBytes;
  }

  // Eight neighbours of a vector.
  __device__ __forceinline__ void load_vector(Vector which, int32_t c, int32_t piece, float (&values)[8]) const {
    load_shared(vector_place(which) + (c * kChunkColumns + piece * 32 + quarter * 8) * 4, values);
  }

  // A thread's first row, and the line of one of its two as far as it is there: one past the last is read as the last.
  __device__ __forceinline__ int64_t row(int32_t half) const { return int64_t(tile) * kTileRows + first_of_warp + half * 8; }
  __device__ __forceinline__ int64_t readable_row(int32_t half) const { return row(half) < count ? row(half) : count - 1; }

  // Four pairs of a row that begins at `line`, into memory.
  __device__ __forceinline__ void store_piece(S* line, int32_t half, int32_t c, int32_t piece, const uint32_t (&pairs)[4]) const {
    const int32_t column = c * kChunkColumns + piece * 32;
    store_line_inside(line + own_column + column, pairs, column < columns_left && row(half) < count);
  }

  // A chunk of the last D columns of rows [N, stride], from `first` on.
  __device__ __forceinline__ void store_chunk(const float (&w)[32], int32_t c, S* rows, int32_t stride, int32_t first) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        uint32_t pairs[4];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float* values = &w[16 * piece + 4 * i + 2 * half];
          pairs[i] = pack<S>(values[0], values[1]);
        }
        store_piece(rows + row(half) * stride + first, half, c, piece, pairs);
      }
    }
  }

  // A chunk of the tile, as operands of a product.
  __device__ __forceinline__ void load_chunk(int32_t c, uint32_t (&rows)[16]) const {
    for_each_piece(c, [&](int32_t half, int32_t piece, const uint32_t(&pairs)[4]) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) rows[8 * piece + 2 * i + half] = pairs[i];
    });
  }

  // Where the pair of group g lies in the share of the rank that this block collects.
  __device__ __forceinline__ int32_t column_of(int32_t g) const { return g / 4 * 32 + quarter * 8 + g % 4 * 2; }

  // The tile into registers, as change() makes its pairs, and its projection on this block's columns. The product runs on: projection_done().
  template <typename Change, typename Before, typename After>
  __device__ __forceinline__ void project_tile(uint32_t (&rows)[kChunks][16], float (&part)[64], const Change& change, const Before& before,
                                               const After& after) const {
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      before(c);
      load_chunk(c, rows[c]);
#pragma unroll
      for (int32_t i = 0; i < 16; ++i) rows[c][i] = change(rows[c][i]);
      pin(rows[c]);
      products_begin();
      project_chunk(part, c, rows[c]);
      products_commit();
      after(c);
    }
  }

  __device__ __forceinline__ void projection_done(uint32_t (&rows)[kChunks][16], float (&part)[64]) const {
    products_wait();
    pin(part);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) pin(rows[c]);
  }

  // The tile into registers and its projection to the blocks, of which this one's share comes into `own`; `read` comes once the tile has
  // been read, and waits until the others' places are free.
  template <bool kRound = Shares::kRounded, typename Change, typename Read>
  __device__ __forceinline__ void project_and_send(uint32_t (&rows)[kChunks][16], float (&own)[Shares::kOwnGroups][4],
                                                   const Change& change, const Read& read) const {
    project_and_send<kRound>(rows, own, change, [](int32_t) {}, [](int32_t) {}, read);
  }

  template <bool kRound = Shares::kRounded, typename Change, typename Before, typename After, typename Read>
  __device__ __forceinline__ void project_and_send(uint32_t (&rows)[kChunks][16], float (&own)[Shares::kOwnGroups][4], const Change& change,
                                                   const Before& before, const After& after, const Read& read) const {
    float part[64] = {};
    project_tile(rows, part, change, before, after);
    read();
    projection_done(rows, part);
    exchange.template send_parts<kRound>(part, own);
  }

  // Of the last tile, whose parity is not this one's; of its last phase, where it has several.
  __device__ __forceinline__ void wait_for_last_tile(uint32_t parity) const {
    if (!is_first()) wait_phase(exchange.free(), parity ^ 1);
  }

  // The same of a tile that stays where it is, two chunks in registers at a time; `wait` comes while the product runs.
  template <bool kRound, typename Wait>
  __device__ __forceinline__ void project_standing_and_send(float (&own)[Shares::kOwnGroups][4], const Wait& wait) const {
    float part[64] = {};
    uint32_t rows[2][16];
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      if (c >= 2) products_wait(1);
      load_chunk(c, rows[c % 2]);
      pin(rows[c % 2]);
      products_begin();
      project_chunk(part, c, rows[c % 2]);
      products_commit();
    }
    wait();
    products_wait();
    pin(part);
    exchange.template send_parts<kRound>(part, own);
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

  // w += Q k; `own` are this block's share of the coefficients. read() comes once k is in registers, body(c) once chunk c is there; kAhead
  // chunks are multiplied meanwhile. A warp waits until the tensor cores take a product, so that few leave it time for body().
  template <int kAhead, typename Read, typename Body>
  __device__ __forceinline__ void rebuild_rows(float (&w)[kChunks][32], const uint32_t (&own)[Shares::kOwnSteps][4], uint32_t kind,
                                               const Read& read, const Body& body) const {
    uint32_t k[kSteps][4];
    exchange.all_coefficients(own, k, kind);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
#pragma unroll
    for (int32_t c = 0; c < kAhead; ++c) {
      if (c == 0 || kAhead < kChunks) products_begin();
      rebuild_chunk(w[c], c, k);
      products_commit();
    }
    read();
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      if (c + kAhead < kChunks) {
        products_begin();
        rebuild_chunk(w[c + kAhead], c + kAhead, k);
        products_commit();
      }
      products_wait(c + kAhead < kChunks ? kAhead : kChunks - 1 - c);
      pin(w[c]);
      body(c);
    }
  }

  // body(c, Q k in the columns of chunk c) while the next chunk is multiplied.
  template <typename Body>
  __device__ __forceinline__ void for_each_product(const uint32_t (&k)[kSteps][4], const Body& body) const {
    float sums[2][32];
    const auto start = [&](int32_t c) {
#pragma unroll
      for (int32_t i = 0; i < 32; ++i) sums[c % 2][i] = 0.f;
      pin(sums[c % 2]);
      products_begin();
      rebuild_chunk(sums[c % 2], c, k);
      products_commit();
    };
    start(0);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      if (c + 1 < kChunks) start(c + 1);
      products_wait(c + 1 < kChunks ? 1 : 0);
      pin(sums[c % 2]);
      body(c, sums[c % 2]);
    }
  }

  // |w|^2 and w.shift of both rows, over the columns of a chunk.
  __device__ __forceinline__ void add_squares(const float (&w)[32], int32_t c, float (&sums)[4]) const {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      float shift[8];
      load_vector(kShift, c, piece, shift);
#pragma unroll
      for (int32_t i = 0; i < 8; ++i) {
        const float* values = &w[16 * piece + i / 2 * 4 + i % 2];
        sums[0] = fmaf(values[0], values[0], sums[0]);
        sums[1] = fmaf(values[0], shift[i], sums[1]);
        sums[2] = fmaf(values[2], values[2], sums[2]);
        sums[3] = fmaf(values[2], shift[i], sums[3]);
      }
    }
  }

  // A chunk of e = Norm(w/|w| + shift) into rows [N, D].
  __device__ __forceinline__ void store_unit_rows(const float (&w)[32], int32_t c, const Scales (&scales)[2], S* out) const {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      float shift[8];
      load_vector(kShift, c, piece, shift);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const float factor = scales[half].inverse * scales[half].outer, shift_factor = scales[half].outer;
        uint32_t pairs[4];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float* values = &w[16 * piece + 4 * i + 2 * half];
          pairs[i] = pack<S>(fmaf(values[0], factor, shift[2 * i] * shift_factor),
                             fmaf(values[1], factor, shift[2 * i + 1] * shift_factor));
        }
        store_piece(out + row(half) * width, half, c, piece, pairs);
      }
    }
  }
};

}  // namespace aniso::sm90
