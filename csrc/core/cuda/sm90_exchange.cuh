// What the blocks of a cluster tell each other about a tile of rows whose columns they share, for one warpgroup of each.
//
// Blocks name each other by distance: `to` sends to the block that many ranks on, where it lies in slot kCluster - 1 - to; what lies in
// slot from - 1 is from the block `from` ranks on. All that a warp reads was sent to it by its twins in the other blocks: no warp waits
// for another. Barriers of sm90_layout.cuh say when; their phases follow the tiles.
#pragma once

#include "sm90_instructions.cuh"
#include "sm90_layout.cuh"
#include "sm90_pieces.cuh"

namespace aniso::sm90 {

template <int kCluster>
struct Exchange {
  static constexpr int32_t kOwnColumns = kRank / kCluster;  // of a projection, that a block collects; first in the order of its basis
  static constexpr int32_t kOwnGroups = kOwnColumns / 8;
  static constexpr int32_t kOwnSteps = kSteps / kCluster;
  static constexpr uint32_t kPartBytes = kTileRows * kOwnColumns * 4;  // of a projection, for one receiver
  static constexpr uint32_t kRoundedBytes = kPartBytes / 2, kCoefficientBytes = kPartBytes / 2;
  static constexpr uint32_t kNormsOffset = (kCluster - 1) * kPartBytes;

  uint32_t memory, barriers;  // of this warpgroup
  uint32_t rank;
  int32_t thread, warp, lane;

  __device__ __forceinline__ uint32_t ranks_on(uint32_t distance) const { return (rank + distance) % kCluster; }
  __device__ __forceinline__ uint32_t barrier(size_t offset) const { return barriers + uint32_t(offset); }
  __device__ __forceinline__ uint32_t norms_place() const { return memory + kNormsOffset + (warp * 8 + lane / 4) * 16; }

  // An arrival overtakes loads: what they brought must have been used before.
  __device__ __forceinline__ void warp_tells_others(uint32_t which) const {
    __syncwarp();
    if (lane != 0) return;
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) arrive_remote(remote_address(which, ranks_on(to)));
  }

  // Of a projection over this block's columns, to each block the share that it collects.
  template <int kCount>
  __device__ __forceinline__ void send_parts(const float (&part)[kCount]) const {
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) {
      const uint32_t projected = remote_address(barrier(offsetof(Barriers, projected)), ranks_on(to));
      const uint32_t target = remote_address(memory + (kCluster - 1 - to) * kPartBytes + thread * 16, ranks_on(to));
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups; ++v) {
        const float* values = &part[(to * kOwnGroups + v) * 4];
        store_remote(target + v * kWarpgroupThreads * 16, projected, __float_as_uint(values[0]), __float_as_uint(values[1]),
                     __float_as_uint(values[2]), __float_as_uint(values[3]));
      }
    }
  }

  __device__ __forceinline__ void add_parts(float (&own)[kOwnGroups][4]) const {
#pragma unroll
    for (uint32_t slot = 0; slot < kCluster - 1; ++slot) {
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups; ++v) {
        const float4 part = load_shared(memory + slot * kPartBytes + (v * kWarpgroupThreads + thread) * 16);
        own[v][0] += part.x;
        own[v][1] += part.y;
        own[v][2] += part.z;
        own[v][3] += part.w;
      }
    }
  }

  // The same rounded to the format of the rows, where that is no less than what is done to the coefficients.
  template <typename S>
  __device__ __forceinline__ void send_rounded_parts(const float (&part)[64]) const {
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) {
      const uint32_t projected = remote_address(barrier(offsetof(Barriers, projected)), ranks_on(to));
      const uint32_t target = remote_address(memory + (kCluster - 1 - to) * kRoundedBytes + thread * 16, ranks_on(to));
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups / 2; ++v) {
        const float* values = &part[(to * kOwnGroups + 2 * v) * 4];
        store_remote(target + v * kWarpgroupThreads * 16, projected, pack<S>(values[0], values[1]), pack<S>(values[2], values[3]),
                     pack<S>(values[4], values[5]), pack<S>(values[6], values[7]));
      }
    }
  }

  template <typename S>
  __device__ __forceinline__ void add_rounded_parts(float (&own)[kOwnGroups][4]) const {
#pragma unroll
    for (uint32_t slot = 0; slot < kCluster - 1; ++slot) {
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups / 2; ++v) {
        const float4 part = load_shared(memory + slot * kRoundedBytes + (v * kWarpgroupThreads + thread) * 16);
        const float packed[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float2 pair = unpack<S>(__float_as_uint(packed[i]));
          own[2 * v + i / 2][i % 2 * 2] += pair.x;
          own[2 * v + i / 2][i % 2 * 2 + 1] += pair.y;
        }
      }
    }
  }

  // Coefficients of this block's share, as operands of the second product; `place` is where they lie in the exchange.
  template <int kKinds>
  __device__ __forceinline__ void send_coefficients(const uint32_t (&own)[kKinds][kOwnSteps][4], uint32_t place) const {
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) {
      const uint32_t mapped = remote_address(barrier(offsetof(Barriers, mapped)), ranks_on(to));
      const uint32_t target =
          remote_address(memory + place + (kCluster - 1 - to) * kKinds * kCoefficientBytes + thread * 16, ranks_on(to));
#pragma unroll
      for (int32_t i = 0; i < kKinds * kOwnSteps; ++i) {
        const uint32_t(&k)[4] = own[i / kOwnSteps][i % kOwnSteps];
        store_remote(target + i * kWarpgroupThreads * 16, mapped, k[0], k[1], k[2], k[3]);
      }
    }
  }

  // Those of one step of the product, in the order of this block's basis.
  template <int kKinds>
  __device__ __forceinline__ void coefficients(const uint32_t (&own)[kKinds][kOwnSteps][4], uint32_t place, int32_t kind, int32_t step,
                                               uint32_t (&k)[4]) const {
    const int32_t from = step / kOwnSteps;
    if (from == 0) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) k[j] = own[kind][step][j];
    } else {
      const float4 theirs = load_shared(memory + place + (from - 1) * kKinds * kCoefficientBytes +
                                        ((kind * kOwnSteps + step % kOwnSteps) * kWarpgroupThreads + thread) * 16);
      k[0] = __float_as_uint(theirs.x);
      k[1] = __float_as_uint(theirs.y);
      k[2] = __float_as_uint(theirs.z);
      k[3] = __float_as_uint(theirs.w);
    }
  }

  // Four sums of a thread's two rows, equal in the lanes that share them.
  __device__ __forceinline__ void send_sums(const float (&sums)[4], uint32_t which) const {
    if (lane % 4 != 0) return;
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) {
      store_remote(remote_address(norms_place() + (kCluster - 1 - to) * kNormsBytes, ranks_on(to)),
                   remote_address(which, ranks_on(to)), __float_as_uint(sums[0]), __float_as_uint(sums[1]),
                   __float_as_uint(sums[2]), __float_as_uint(sums[3]));
    }
  }

  // Over all blocks. In pairs, so that every block adds the same numbers in the same order and scales alike.
  __device__ __forceinline__ void total_sums(const float (&sums)[4], float (&total)[4]) const {
    float4 others[kCluster - 1];
#pragma unroll
    for (uint32_t from = 1; from < kCluster; ++from) others[from - 1] = load_shared(norms_place() + (from - 1) * kNormsBytes);
    if constexpr (kCluster == 4) {
      total[0] = (sums[0] + others[1].x) + (others[0].x + others[2].x);
      total[1] = (sums[1] + others[1].y) + (others[0].y + others[2].y);
      total[2] = (sums[2] + others[1].z) + (others[0].z + others[2].z);
      total[3] = (sums[3] + others[1].w) + (others[0].w + others[2].w);
    } else {
      total[0] = sums[0] + others[0].x;
      total[1] = sums[1] + others[0].y;
      total[2] = sums[2] + others[0].z;
      total[3] = sums[3] + others[0].w;
    }
  }
};

}  // namespace aniso::sm90
