// The ring of stages that a basis streams through (sm90_stream.cuh): what a block's shared memory holds, and the warp that fills it.
#pragma once

#include "sm90_maps.h"
#include "sm90_radius.cuh"

namespace aniso::sm90 {

template <typename S>
struct StreamArguments {
  Sm90Operands<S> in;  // `shuffled` in the order of its rows alone, [sm90_padded(D), kColumns]; cells and map_scales of kColumns / 2 blocks
  int64_t count;
  int32_t stages;   // of the ring
  int32_t columns;  // stream_columns(D)
  int32_t run;      // groups of the rank whose cells pass through one stage
  S* out;           // [N, D]
};

constexpr int32_t kStreamCluster = 2, kStreamGroups = 2, kMostStages = 6;
constexpr uint16_t kStreamBlocks = (1 << kStreamCluster) - 1;  // of a pair, as multicasts name them
constexpr int32_t kStreamRows = kStreamGroups * kTileRows;     // of a block's tile

// The columns that the second pass goes over: pairs of chunks.
constexpr int32_t stream_columns(int32_t width) { return (width + 2 * kChunkColumns - 1) / (2 * kChunkColumns) * (2 * kChunkColumns); }

template <int kColumns>
struct StreamShared {
  static constexpr int32_t kThreads = (kStreamGroups + 1) * kWarpgroupThreads, kWarpgroups = kStreamGroups * kStreamCluster;
  static constexpr uint32_t kRowsBytes = kStreamGroups * kTileChunkBytes;
  static constexpr int32_t kPieceColumns = 64;  // of Q, whose rows in a piece have 128 bytes
  static constexpr int32_t kPieces = kColumns / kPieceColumns, kOwnPieces = kPieces / kStreamCluster;
  static constexpr uint32_t kPieceRowBytes = kPieceColumns * 2, kPieceBytes = kChunkColumns * kPieceRowBytes;
  static constexpr uint32_t kStageBytes = kRowsBytes + kPieces * kPieceBytes;
  static constexpr uint32_t kLimit = 232448;       // a block has 227 KB of shared memory
  static constexpr int32_t kGroups = kColumns / 8; // of the rank: four blocks side by side, a fragment's columns
  static constexpr uint32_t kCellUnit = 16;        // bytes: one cell of each block of a group
  static constexpr uint32_t kLineBytes = 128;      // of cells, as the copy engine takes them
  static constexpr int32_t kLineUnits = kLineBytes / kCellUnit;

  struct Rest {
    Coordinates<kColumns> coordinates;
    uint64_t full[kMostStages], empty[kMostStages];
  };

  // Bytes beside the stages: the rest, then offset and shift.
  static constexpr uint32_t rest_bytes(int32_t width) { return uint32_t(sizeof(Rest)) + 2 * uint32_t(stream_columns(width)) * 4; }
  static constexpr int32_t stages(int32_t width) {
    const int32_t room = int32_t((kLimit - rest_bytes(width)) / kStageBytes);
    return room < kMostStages ? room : kMostStages;
  }
  static constexpr uint32_t bytes(int32_t width) { return stages(width) * kStageBytes + rest_bytes(width); }

  // The groups, a power of two, whose cells a stage holds; 0 if there are none, or if their halves are no whole boxes.
  static constexpr int32_t run(int32_t cell_count) {
    int32_t groups = kGroups;
    while (groups > 0 && int64_t(groups) * (cell_count + 1) * kCellUnit > int64_t(kStageBytes)) groups /= 2;
    const bool whole = int64_t(groups) * (cell_count + 1) * kCellUnit % (kStreamCluster * kBoxRows * kLineBytes) == 0;
    return whole ? groups : 0;
  }
};

// The ring as a warp sees it, at one stage after another.
template <int kColumns>
struct Ring {
  using Layout = StreamShared<kColumns>;

  uint32_t memory, barriers;
  int32_t stages;
  int32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ Ring(unsigned char* shared_memory, const typename Layout::Rest& rest, int32_t stages)
      : memory(shared_address(shared_memory)), barriers(shared_address(rest.full)), stages(stages) {}

  __device__ __forceinline__ uint32_t full() const { return barriers + slot * 8; }
  __device__ __forceinline__ uint32_t empty(int32_t of) const { return barriers + (kMostStages + of) * 8; }
  __device__ __forceinline__ uint32_t rows() const { return memory + slot * Layout::kStageBytes; }
  __device__ __forceinline__ uint32_t basis() const { return rows() + Layout::kRowsBytes; }
  __device__ __forceinline__ uint32_t cells() const { return rows(); }

  __device__ __forceinline__ void begin() const {
    for (int32_t of = 0; of < stages; ++of) {
      barrier_init(barriers + of * 8, 1);
      barrier_init(empty(of), Layout::kWarpgroups * kWarps);
    }
    barrier_init_fence();
  }
  __device__ __forceinline__ void advance() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }

  // For the warp that fills: once the warps of both blocks are done with the stage.
  __device__ __forceinline__ void wait_to_fill(uint32_t bytes) const {
    wait_phase(empty(slot), parity ^ 1);
    arrive_expecting(full(), bytes);
  }
  // For the others.
  __device__ __forceinline__ void wait_until_full() const { wait_phase(full(), parity); }
  // Once what was read has been used.
  __device__ __forceinline__ void release(int32_t of, int32_t lane) const { release_by(0, of, lane); }
  // What was read, all of it joined in `read`, is used only later: a vote awaits it in every lane. Which lanes tell the blocks depends on
  // the vote; one without consequence would be left out.
  __device__ __forceinline__ void release_after(uint32_t read, int32_t of, int32_t lane) const {
    release_by(__any_sync(0xffffffffu, read != 0) ? 0 : 1, of, lane);
  }

 private:
  __device__ __forceinline__ void release_by(int32_t senders, int32_t of, int32_t lane) const {
    reads_before_copy_fence();
    __syncwarp();
    if (lane / kStreamCluster == senders) arrive_remote(remote_address(empty(of), lane % kStreamCluster));
  }
};

// Fills the ring of one block. Of Q and of the cells a block fetches its half and sends it to the pair.
template <typename S, int kColumns>
struct StreamSource {
  using Layout = StreamShared<kColumns>;

  const CUtensorMap &rows_map, &basis_map, &shuffled_map, &cells_map;
  const StreamArguments<S>& arguments;
  Ring<kColumns> ring;
  int32_t block;

  __device__ __forceinline__ void rows(int32_t column, int32_t first_row, uint64_t policy) const {
    for (int32_t g = 0; g < kStreamGroups; ++g) {
      load_box(ring.rows() + g * kTileChunkBytes, rows_map, column, first_row + g * kTileRows, ring.full(), policy);
    }
  }
  __device__ __forceinline__ void basis(int32_t piece, const CUtensorMap& map, int32_t column, int32_t row) const {
    load_box_to_all(ring.basis() + piece * Layout::kPieceBytes, map, column, row, ring.full(), kStreamBlocks);
  }

  // y and Q for p, chunk after chunk.
  __device__ __forceinline__ void for_projection(int32_t first_row, uint64_t policy) {
    for (int32_t column = 0; column < arguments.in.width; column += kChunkColumns, ring.advance()) {
      ring.wait_to_fill(Layout::kStageBytes);
      rows(column, first_row, policy);
      for (int32_t i = 0; i < Layout::kOwnPieces; ++i) {
        const int32_t piece = block * Layout::kOwnPieces + i;
        basis(piece, basis_map, piece * Layout::kPieceColumns, column);
      }
    }
  }

  // The table of the radius maps.
  __device__ __forceinline__ void for_maps() {
    const int32_t lines = arguments.run * (arguments.in.cell_count + 1) / Layout::kLineUnits, own = lines / kStreamCluster;
    for (int32_t first = 0; first < Layout::kGroups / arguments.run * lines; first += lines, ring.advance()) {
      ring.wait_to_fill(lines * Layout::kLineBytes);
      for (int32_t line = block * own; line < (block + 1) * own; line += kBoxRows) {
        load_box_to_all(ring.cells() + line * Layout::kLineBytes, cells_map, 0, first + line, ring.full(), kStreamBlocks);
      }
    }
  }

  // y and Q for w, two chunks at a time: with the first the upper half of the rank for both, with the second the lower.
  __device__ __forceinline__ void for_rows(int32_t first_row, uint64_t policy) {
    for (int32_t column = 0; column < arguments.columns; column += kChunkColumns, ring.advance()) {
      const int32_t second = column / kChunkColumns % 2, pair = column - second * kChunkColumns;
      ring.wait_to_fill(Layout::kStageBytes);
      rows(column, first_row, policy);
      for (int32_t i = 0; i < Layout::kOwnPieces; ++i) {
        const int32_t piece = block * Layout::kOwnPieces + i;
        basis(piece, shuffled_map, second * (kColumns / 2) + piece / 2 * Layout::kPieceColumns, pair + piece % 2 * kChunkColumns);
      }
    }
  }

  // For one thread.
  __device__ __forceinline__ void fill(int64_t pairs) {
    const uint64_t once_more = evicted_last(), last_time = evicted_first();
    for (int64_t pair = cluster_index(); pair < pairs; pair += cluster_count()) {
      const int32_t first_row = int32_t((pair * kStreamCluster + block) * kStreamRows);
      for_projection(first_row, once_more);
      for_maps();
      for_rows(first_row, last_time);
    }
  }
};

}  // namespace aniso::sm90
