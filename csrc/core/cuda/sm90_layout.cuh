// Shapes of the Hopper kernels and their barriers.
#pragma once

#include "aniso/cuda_sm90.h"

namespace aniso::sm90 {

constexpr int32_t kTileRows = 64;
constexpr int32_t kChunkColumns = 64;
constexpr int32_t kRank = kSm90Rank;  // columns of the basis past R are zero
constexpr int32_t kWarpgroupThreads = 128;
constexpr int32_t kSteps = kRank / 16;
constexpr int32_t kPanelColumns = 16;  // of the basis: one step of the second product
constexpr uint32_t kPanelRowBytes = kPanelColumns * 2;
constexpr uint32_t kTileChunkBytes = kTileRows * kChunkColumns * 2;
constexpr int32_t kWarps = kWarpgroupThreads / 32;  // of a warpgroup

// Of a warpgroup.
template <int kKinds>
struct Barriers {
  uint64_t loaded;          // the tile is in shared memory
  uint64_t projected;       // parts of a projection have come
  uint64_t mapped[kKinds];  // coefficients have come
  uint64_t summed;          // sums over rows have come
  uint64_t free;            // the others no longer read what came with the last tile
};

}  // namespace aniso::sm90
