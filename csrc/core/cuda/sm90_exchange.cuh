// What the blocks of a cluster tell each other about a tile of rows whose columns they share, for one warpgroup of each.
//
// Blocks name each other by distance: `to` sends to the block that many ranks on, where it lies in slot kCluster - 1 - to; what lies in
// slot from - 1 is from the block `from` ranks on. All that a warp reads was sent to it by its twins in the other blocks: no warp waits
// for another. Parts of a projection, coefficients and sums have places of their own, so that nothing is overwritten before the tile is
// done or what follows from it has come back. Parts in fp32 leave no room for coefficients: they go where the receiving warp had its rows of
// the tile, which it has read when its parts come. Nor for sums: they go where the sender's parts were, as who has all coefficients knows
// that all warps of the others have read theirs.
// Where a tile has two projections, the second's parts and the coefficients take the place of the first's parts, once the receiver has told that
// it has used them.
#pragma once

#include "sm90_instructions.cuh"
#include "sm90_layout.cuh"
#include "sm90_pieces.cuh"

namespace aniso::sm90 {

// How parts of a projection travel: in fp32; in the format of the rows, which is for what only meets coefficients that are rounded
// themselves; or, of two projections of a tile, the first in fp32 and the second rounded.
enum class Parts { kExact, kRounded, kExactThenRounded };

// kKinds: sets of coefficients, each of which may come by itself.
template <typename S, Parts kParts, int kCluster, int kKinds>
struct Exchange {
  static constexpr bool kRounded = kParts == Parts::kRounded, kInTile = kParts == Parts::kExact;  // parts; coefficients
  static constexpr int32_t kOwnColumns = kRank / kCluster;  // of a projection, that a block collects; first in the order of its basis
  static constexpr int32_t kOwnGroups = kOwnColumns / 8, kOwnSteps = kSteps / kCluster;
  static constexpr uint32_t kShareBytes = kTileRows * kOwnColumns * 2;  // of coefficients or of rounded parts, for one receiver
  static constexpr uint32_t kSumsBytes = kTileRows / 2 * 32;  // of up to eight sums for each pair of rows
  static constexpr uint32_t kBarrierBytes = sizeof(Barriers<kKinds>);
  static constexpr uint32_t kCoefficients = (kCluster - 1) * kShareBytes;
  static constexpr uint32_t kSums = kInTile ? 0 : (kCluster - 1) * (1 + kKinds) * kShareBytes;
  static constexpr uint32_t kSumsStride = kInTile ? 2 * kShareBytes : kSumsBytes;  // from slot to slot
  static constexpr uint32_t kBytes = kInTile ? 2 * (kCluster - 1) * kShareBytes : kSums + (kCluster - 1) * kSumsBytes;

  uint32_t memory, tile, barriers;  // of this warpgroup
  uint32_t rank;
  int32_t thread, warp, lane;

  __device__ __forceinline__ uint32_t ranks_on(uint32_t distance) const { return (rank + distance) % kCluster; }
  __device__ __forceinline__ uint32_t barrier(size_t offset) const { return barriers + uint32_t(offset); }
  __device__ __forceinline__ uint32_t loaded() const { return barrier(offsetof(Barriers<kKinds>, loaded)); }
  __device__ __forceinline__ uint32_t projected() const { return barrier(offsetof(Barriers<kKinds>, projected)); }
  __device__ __forceinline__ uint32_t mapped(uint32_t kind = 0) const { return barrier(offsetof(Barriers<kKinds>, mapped) + kind * 8); }
  __device__ __forceinline__ uint32_t summed() const { return barrier(offsetof(Barriers<kKinds>, summed)); }
  __device__ __forceinline__ uint32_t free() const { return barrier(offsetof(Barriers<kKinds>, free)); }

  template <bool kRound>
  static constexpr uint32_t kPartBytes = kRound ? kShareBytes : 2 * kShareBytes;  // for one receiver

  template <bool kRound = kRounded>
  __device__ __forceinline__ void expect_parts() const {
    arrive_expecting(projected(), (kCluster - 1) * kPartBytes<kRound>);
  }
  __device__ __forceinline__ void expect_coefficients() const {
#pragma unroll
    for (uint32_t kind = 0; kind < kKinds; ++kind) arrive_expecting(mapped(kind), (kCluster - 1) * kShareBytes);
  }
  __device__ __forceinline__ void expect_sums(uint32_t count) const {
    arrive_expecting(summed(), (kCluster - 1) * kTileRows / 2 * count * uint32_t(sizeof(float)));
  }

  // Of a projection over this block's columns, to each block the share that it collects. This block's own share comes into `own`.
  template <bool kRound = kRounded>
  __device__ __forceinline__ void send_parts(const float (&part)[64], float (&own)[kOwnGroups][4]) const {
#pragma unroll
    for (int32_t i = 0; i < kOwnGroups * 4; ++i) own[i / 4][i % 4] = part[i];
    constexpr int32_t kEach = kRound ? 8 : 4;  // values in a store
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) {
      const uint32_t signal = remote_address(projected(), ranks_on(to));
      const uint32_t target = remote_address(memory + (kCluster - 1 - to) * kPartBytes<kRound> + thread * 16, ranks_on(to));
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups * 4 / kEach; ++v) {
        const float* values = &part[to * kOwnGroups * 4 + v * kEach];
        if constexpr (kRound) {
          store_remote(target + v * kWarpgroupThreads * 16, signal, pack<S>(values[0], values[1]), pack<S>(values[2], values[3]),
                       pack<S>(values[4], values[5]), pack<S>(values[6], values[7]));
        } else {
          store_remote(target + v * kWarpgroupThreads * 16, signal, __float_as_uint(values[0]), __float_as_uint(values[1]),
                       __float_as_uint(values[2]), __float_as_uint(values[3]));
        }
      }
    }
  }

  template <bool kRound = kRounded>
  __device__ __forceinline__ void add_parts(float (&own)[kOwnGroups][4]) const {
    constexpr int32_t kEach = kRound ? 2 : 1;  // groups in a load
#pragma unroll
    for (uint32_t slot = 0; slot < kCluster - 1; ++slot) {
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups / kEach; ++v) {
        uint32_t words[4];
        load_shared(memory + slot * kPartBytes<kRound> + (v * kWarpgroupThreads + thread) * 16, words);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          if constexpr (kRound) {
            const float2 pair = unpack<S>(words[i]);
            own[2 * v + i / 2][i % 2 * 2] += pair.x;
            own[2 * v + i / 2][i % 2 * 2 + 1] += pair.y;
          } else {
            own[v][i] += __uint_as_float(words[i]);
          }
        }
      }
    }
  }

  // Where a warp receives its nth operand.
  __device__ __forceinline__ uint32_t operand_place(uint32_t n) const {
    if constexpr (!kInTile) return memory + kCoefficients + (n * kWarpgroupThreads + thread) * 16;
    return tile + n / 4 * kTileChunkBytes + warp * 2048 + n % 4 * 512 + lane * 16;
  }

  // Coefficients of this block's share, from the operand `first` up to `last`.
  __device__ __forceinline__ void send_coefficients(const uint32_t (&own)[kOwnSteps][4], uint32_t kind = 0, int32_t first = 0,
                                                    int32_t last = kOwnSteps) const {
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) {
      const uint32_t signal = remote_address(mapped(kind), ranks_on(to));
#pragma unroll
      for (int32_t i = first; i < last; ++i) {
        const uint32_t(&k)[4] = own[i];
        const uint32_t target = operand_place(((kCluster - 1 - to) * kKinds + kind) * kOwnSteps + i);
        store_remote(remote_address(target, ranks_on(to)), signal, k[0], k[1], k[2], k[3]);
      }
    }
  }

  // Those of all blocks, in the order of this block's basis.
  __device__ __forceinline__ void all_coefficients(const uint32_t (&own)[kOwnSteps][4], uint32_t (&k)[kSteps][4], uint32_t kind = 0) const {
#pragma unroll
    for (int32_t step = 0; step < kSteps; ++step) {
      const int32_t from = step / kOwnSteps;
      if (from == 0) {
#pragma unroll
        for (int32_t j = 0; j < 4; ++j) k[step][j] = own[step][j];
      } else {
        load_shared(operand_place(((from - 1) * kKinds + kind) * kOwnSteps + step % kOwnSteps), k[step]);
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ uint32_t sums_place() const {
    return memory + kSums + (warp * 8 + lane / 4) * (kCount * 4);
  }

  // Sums of a thread's two rows, four or eight: over the lanes that share the rows, then to the other blocks.
  template <int kCount>
  __device__ __forceinline__ void send_sums(float (&sums)[kCount]) const {
    const uint32_t place = sums_place<kCount>();
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) sums[i] = sum_over_row(sums[i]);
    if (lane % 4 == 0) {
#pragma unroll
      for (uint32_t to = 1; to < kCluster; ++to) {
        const uint32_t target = remote_address(place + (kCluster - 1 - to) * kSumsStride, ranks_on(to));
        const uint32_t signal = remote_address(summed(), ranks_on(to));
#pragma unroll
        for (int32_t i = 0; i < kCount; i += 4) {
          store_remote(target + i * 4, signal, __float_as_uint(sums[i]), __float_as_uint(sums[i + 1]), __float_as_uint(sums[i + 2]),
                       __float_as_uint(sums[i + 3]));
        }
      }
    }
  }

  // Those over all blocks, in pairs, so that every block adds the same numbers in the same order.
  template <int kCount>
  __device__ __forceinline__ void receive_sums(float (&sums)[kCount], uint32_t parity) const {
    const uint32_t place = sums_place<kCount>();
    wait_phase(summed(), parity);
#pragma unroll
    for (int32_t i = 0; i < kCount; i += 4) {
      uint32_t others[kCluster - 1][4];
#pragma unroll
      for (uint32_t from = 1; from < kCluster; ++from) load_shared(place + (from - 1) * kSumsStride + i * 4, others[from - 1]);
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        if constexpr (kCluster == 4) {
          sums[i + j] = (sums[i + j] + __uint_as_float(others[1][j])) + (__uint_as_float(others[0][j]) + __uint_as_float(others[2][j]));
        } else {
          sums[i + j] += __uint_as_float(others[0][j]);
        }
      }
    }
  }

  // What came to this warp has been used, and its place is free: an arrival would overtake loads.
  __device__ __forceinline__ void warp_is_done() const {
    __syncwarp();
    if (lane != 0) return;
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) arrive_remote(remote_address(free(), ranks_on(to)));
  }
};

}  // namespace aniso::sm90
