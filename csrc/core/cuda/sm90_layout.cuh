// Shapes and shared memory of the Hopper kernels, for the device and for the launcher.
#pragma once

#include "aniso/cuda_sm90.h"

namespace aniso::sm90 {

enum class Result { kRows, kSums, kState };

constexpr int32_t kTileRows = 64;
constexpr int32_t kChunkColumns = 64;
constexpr int32_t kRank = kSm90Rank;  // columns of the basis past R are zero
constexpr int32_t kWarpgroupThreads = 128;
constexpr int32_t kSteps = kRank / 16;
constexpr int32_t kPanelColumns = 16;  // of the basis: one step of the second product
constexpr uint32_t kPanelRowBytes = kPanelColumns * 2;
constexpr uint32_t kTileChunkBytes = kTileRows * kChunkColumns * 2;
constexpr uint32_t kNormsBytes = kTileRows / 2 * 16;
constexpr int32_t kWarpgroups = 2;  // of a block: registers leave room for no more
constexpr int32_t kWarps = kWarpgroupThreads / 32;  // of a warpgroup

struct Barriers {
  uint64_t loaded;         // the tile is in shared memory
  uint64_t projected;      // parts of p have come
  uint64_t mapped;         // parts of k have come
  uint64_t summed;         // sums for the norms have come (diagonal complement)
  uint64_t parts_read;     // the others have read their parts of p
  uint64_t exchange_free;  // the others no longer read what came with the last tile
};

// Columns of the panel that follows the basis: offset and shift in two pieces each, and the larger piece of the shift once more. They give
// y.offset and y.shift in the first product, and add offset + |w| shift to the rows in the second, where |w| has two pieces.
enum Tail { kOffsetHigh, kOffsetLow, kShiftHigh, kShiftLow, kShiftHighAgain };

// Constants of the coordinates that a block maps, zero past R. t is the target's coordinate, t_b that plus the bias.
template <int kCluster>
struct CoordinateVectors {
  float turned_bias[kRank / kCluster];    // t_b
  float scaled_target[kRank / kCluster];  // s t; diagonal: t
  float cross[kRank / kCluster];          // 2 (Q^T offset - s t_b)
  float shift[kRank / kCluster];          // Q^T shift
  float cell_scale[kRank / kCluster / 2];
  float map[kRank / kCluster];  // of each block its last slope and the unit of its cells
};

// Constants of the columns that a block owns, zero past D; only the diagonal complement reads them.
template <int kChunks>
struct ColumnVectors {
  float offset[kChunks * kChunkColumns];
  float shift[kChunks * kChunkColumns];
  float scale[kChunks * kChunkColumns];
};

template <int kCluster, int kChunks, bool kDiagonal>
struct Shared {
  static constexpr uint32_t kPartBytes = kTileRows * (kRank / kCluster) * 4;  // of p, for one receiver
  static constexpr uint32_t kNormsOffset = (kCluster - 1) * kPartBytes;
  // Panels of the basis, that of the block's own coordinates first, then the tail; rows under the 32-byte swizzle.
  static constexpr int32_t kPanels = kSteps + (kDiagonal ? 0 : 1);
  static constexpr uint32_t kPanelBytes = kChunks * kChunkColumns * kPanelRowBytes;
  static constexpr uint32_t kBasis = 0;
  static constexpr uint32_t kTail = kSteps * kPanelBytes;
  static constexpr uint32_t kTiles = kPanels * kPanelBytes;
  static constexpr uint32_t kTileBytes = kChunks * kTileChunkBytes;
  static constexpr uint32_t kExchangeBytes = kNormsOffset + 2048;  // a multiple of a swizzled tile
  static constexpr int32_t kStagingSlots = kNormsOffset / kTileChunkBytes;  // a chunk on its way out takes one
  static constexpr uint32_t kExchanges = kTiles + kWarpgroups * kTileBytes;
  static constexpr uint32_t kColumns = kExchanges + kWarpgroups * kExchangeBytes;
  static constexpr uint32_t kCoordinates = kColumns + (kDiagonal ? uint32_t(sizeof(ColumnVectors<kChunks>)) : 0);
  static constexpr uint32_t kBarriers = kCoordinates + uint32_t(sizeof(CoordinateVectors<kCluster>));
  static constexpr uint32_t kBytes = kBarriers + kWarpgroups * uint32_t(sizeof(Barriers)) + 8;
  static_assert(kTiles % 1024 == 0, "the swizzle of a tile repeats every 1024 bytes");
  static_assert((kCluster - 1) * kNormsBytes <= 2048, "the exchange overflows");
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");
};

template <typename S>
struct Arguments {
  Sm90Operands<S> in;
  int64_t count;
  S* out;              // kRows, kState
  int64_t out_stride;  // elements from one of its rows to the next
  float* partial;      // kSums
};

}  // namespace aniso::sm90
