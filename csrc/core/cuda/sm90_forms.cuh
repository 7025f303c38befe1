// The closed form on Hopper where the complement's scale is a number: rows, or their column sums (METHOD sections 4 and 5, D17).
//
//   p = Q^T y        c_t = p + bias        k = T(rho) (cos, sin) - s c_t        w = Q k + s y + offset
//   e' = w/|w|       e = Norm(e' + shift)
//   |w|^2 = k.k + 2 k.(s p + Q^T offset) + |s y + offset|^2     w.shift = k.Q^T shift + (s y + offset).shift     as Q^T Q = I
//
// Both norms are known before w is: the sums and k go round together. That is a round trip less than sm90_correct.cuh needs, for one more
// pass of rows through shared memory; it pays for wide rows, and for sums, which need no rows at all.
//
// Shapes   y, out [N, D]; Q [D, R], R <= 128, D <= 1280; cells [M, G + 1].
// Grid     as in sm90_correct.cuh.
// A tile   1 the copy engine brings 64 rows; 2 partial p from the block's columns, and y.offset and y.shift with it; 3 each block
//          collects its share of p from the others, 4 maps its blocks of the rank, 5 hands k and its part of both norms' sums to
//          the others; meanwhile s y waits in registers and the next tile is on its way; 6 w on top of that, the offset and
//          |w| shift with it; 7 out. Sums of e' need no rows: k, y and 1 over |w| are added up, and Q meets the sum over all rows, so
//          that 5 hands on the sums alone.
// Shared   Q and the tail: 18 KB a chunk of 64 columns. For each warpgroup 8 KB of rows a chunk, and up to 26 KB that carry in
//          turn the parts of p, of k with the sums, and the finished rows on their way out.
// Registers  w stays in fp32: 32 kChunks a thread. Nothing is rounded but k and the result.
// Global   2 D storage values, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster
//          of C go (C - 1) R (4 + 2) bytes for each row.
// FLOP     4 D R for each row, 2 D R for the sums.
#pragma once

#include "sm90_radius.cuh"

namespace aniso::sm90 {

enum class Result { kRows, kSums };

constexpr uint32_t kNormsBytes = kTileRows / 2 * 16;

// Of a warpgroup.
struct FormsBarriers {
  uint64_t loaded;         // the tile is in shared memory
  uint64_t projected;      // parts of p have come
  uint64_t mapped;         // k and the sums for the norms have come
  uint64_t parts_read;     // the others have read their parts of p
  uint64_t exchange_free;  // the others no longer read what came with the last tile
};

// Columns of the panel that follows the basis: offset and shift in two pieces each, and the larger piece of the shift once more. They give
// y.offset and y.shift in the first product, and add offset + |w| shift to the rows in the second, where |w| has two pieces.
enum Tail { kOffsetHigh, kOffsetLow, kShiftHigh, kShiftLow, kShiftHighAgain };

template <int kCluster, int kChunks>
struct FormsShared {
  static constexpr int32_t kWarpgroups = 2, kThreads = kWarpgroups * kWarpgroupThreads;  // of a block: registers leave room for no more
  static constexpr uint32_t kPartBytes = kTileRows * (kRank / kCluster) * 4;  // of p, for one receiver
  static constexpr uint32_t kNormsOffset = (kCluster - 1) * kPartBytes;
  // Panels of the basis, that of the block's own coordinates first, then the tail; rows under the 32-byte swizzle.
  static constexpr uint32_t kPanelBytes = kChunks * kChunkColumns * kPanelRowBytes;
  static constexpr uint32_t kBasis = 0;
  static constexpr uint32_t kTail = kSteps * kPanelBytes;
  static constexpr uint32_t kTiles = (kSteps + 1) * kPanelBytes;
  static constexpr uint32_t kTileBytes = kChunks * kTileChunkBytes;
  static constexpr uint32_t kExchangeBytes = kNormsOffset + 2048;  // a multiple of a swizzled tile
  static constexpr int32_t kStagingSlots = kNormsOffset / kTileChunkBytes;  // a chunk on its way out takes one
  static constexpr uint32_t kExchanges = kTiles + kWarpgroups * kTileBytes;
  static constexpr uint32_t kCoordinates = kExchanges + kWarpgroups * kExchangeBytes;
  static constexpr uint32_t kBarriers = kCoordinates + uint32_t(sizeof(CoordinateVectors<kCluster>));
  static constexpr uint32_t kBytes = kBarriers + kWarpgroups * uint32_t(sizeof(FormsBarriers)) + 8;
  static_assert(kTiles % 1024 == 0, "the swizzle of a tile repeats every 1024 bytes");
  static_assert((kCluster - 1) * kNormsBytes <= 2048, "the exchange overflows");
  static_assert(kBytes <= 232448, "a block has 227 KB of shared memory");
};

template <typename S>
struct FormsArguments {
  Sm90Operands<S> in;
  int64_t count;
  S* out;          // kRows, [N, D]
  float* partial;  // kSums
};

template <typename S, int kCluster, int kChunks, Result kResult>
__global__ void __launch_bounds__(FormsShared<kCluster, kChunks>::kThreads, 1)
    sm90_forms_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                const __grid_constant__ FormsArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = FormsShared<kCluster, kChunks>;
  constexpr uint32_t kPartBytes = Layout::kPartBytes, kNormsOffset = Layout::kNormsOffset;
  constexpr int32_t kOwnColumns = kRank / kCluster;       // of p, that a block maps; first in the order of its basis
  constexpr int32_t kOwnGroups = kOwnColumns / 8;
  constexpr int32_t kLookupGroups = 4;  // whose pieces of the radius map a thread awaits at once: as many as the registers have room for
  constexpr int32_t kOwnSteps = kSteps / kCluster;
  constexpr bool kSums = kResult == Result::kSums, kBuilds = !kSums;  // rows are built, of Q k
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  const uint32_t shared = shared_address(shared_memory);
  // Told to be the same in a warp: the compiler overlaps products only where it knows that control flow is.
  const int32_t warpgroup = __shfl_sync(0xffffffffu, int32_t(threadIdx.x) / kWarpgroupThreads, 0);
  const int32_t thread = threadIdx.x % kWarpgroupThreads;
  const int32_t warp = thread / 32, lane = thread % 32, lane_row = lane / 4, lane_pair = 2 * (lane % 4);
  const uint32_t rank = cluster_rank();
  const bool leader = thread == 0;
  const uint32_t basis = shared + Layout::kBasis;
  const uint32_t tile_memory = shared + Layout::kTiles + warpgroup * Layout::kTileBytes;
  const uint32_t exchange = shared + Layout::kExchanges + warpgroup * Layout::kExchangeBytes;
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Layout::kCoordinates);
  const uint32_t barriers = shared + Layout::kBarriers + warpgroup * uint32_t(sizeof(FormsBarriers));
  const uint32_t loaded = barriers + offsetof(FormsBarriers, loaded), projected = barriers + offsetof(FormsBarriers, projected);
  const uint32_t mapped = barriers + offsetof(FormsBarriers, mapped), parts_read = barriers + offsetof(FormsBarriers, parts_read);
  const uint32_t exchange_free = barriers + offsetof(FormsBarriers, exchange_free);
  const uint64_t tile_operand = wide_operand(tile_memory), basis_operand = narrow_operand(basis, Layout::kPanelBytes);
  const uint32_t basis_loaded = shared + Layout::kBarriers + Layout::kWarpgroups * uint32_t(sizeof(FormsBarriers));
  const int32_t first_column = int32_t(rank) * kChunks * kChunkColumns;

  if (leader) {
    for (const uint32_t barrier : {loaded, projected, mapped}) barrier_init(barrier, 1);
    barrier_init(parts_read, (kCluster - 1) * kWarps);  // from every warp of the others
    barrier_init(exchange_free, (kCluster - 1) * kWarps);
    if (warpgroup == 0) barrier_init(basis_loaded, 1);
    barrier_init_fence();
  }
  cluster_sync();

  const int64_t tiles = (arguments.count + kTileRows - 1) / kTileRows;
  const int64_t stride = int64_t(cluster_count()) * Layout::kWarpgroups;
  int64_t tile = int64_t(cluster_index()) * Layout::kWarpgroups + warpgroup;

  const auto load_tile = [&](int64_t which) {
    arrive_expecting(loaded, Layout::kTileBytes);
    for (int32_t c = 0; c < kChunks; ++c) {
      load_box(tile_memory + c * kTileChunkBytes, rows_map, first_column + c * kChunkColumns, int32_t(which * kTileRows),
               loaded);
    }
  };
  // Blocks name each other by distance: `to` sends to the block that many ranks on, where it lies in slot kCluster - 1 - to;
  // what lies in slot from - 1 is from the block `from` ranks on.
  const auto ranks_on = [&](uint32_t distance) { return (rank + distance) % kCluster; };
  // All that a warp reads of the exchange was sent to it by its twins in the other blocks: no warp waits for another.
  const auto warp_tells_others = [&](uint32_t barrier) {
    __syncwarp();
    if (lane != 0) return;
#pragma unroll
    for (uint32_t to = 1; to < kCluster; ++to) arrive_remote(remote_address(barrier, ranks_on(to)));
  };

  if (leader && warpgroup == 0) {
    arrive_expecting(basis_loaded, kSteps * Layout::kPanelBytes);
    for (int32_t panel = 0; panel < kSteps; ++panel) {
      for (int32_t c = 0; c < kChunks; ++c) {
        load_box(basis + panel * Layout::kPanelBytes + c * kChunkColumns * kPanelRowBytes, basis_map,
                 (int32_t(rank) * kOwnColumns + panel * kPanelColumns) % kRank, first_column + c * kChunkColumns, basis_loaded);
      }
    }
  }
  if (leader && tile < tiles) load_tile(tile);
  const bool shifted = kResult == Result::kRows && in.shift != nullptr;
  const float scalar = in.scale[0];
  for (int32_t j = threadIdx.x; j < kChunks * kChunkColumns; j += blockDim.x) {
    const int32_t column = first_column + j;
    const float offset = column < in.width ? in.offset[column] : 0.f;
    const float shift = shifted && column < in.width ? in.shift[column] : 0.f;
    const float offset_high = rounded<S>(offset), shift_high = rounded<S>(shift);
    const uint32_t row = shared + Layout::kTail + j * kPanelRowBytes, first_half = (j / 4 % 2) * 16;
    store_shared(row + first_half, pack<S>(offset_high, offset - offset_high), pack<S>(shift_high, shift - shift_high),
                 pack<S>(shift_high, 0.f), 0);
    store_shared(row + (first_half ^ 16), 0, 0, 0, 0);
  }
  fill(coordinates, in, int32_t(rank) * kOwnColumns);
  const float offset_squares = dot_of(in.offset, in.offset, in.width, lane), shift_squares = dot_of(in.shift, in.shift, in.width, lane);
  const float offset_shift = dot_of(in.offset, in.shift, in.width, lane);
  // kSums: of y, k and 1 over |w|, for this thread's columns, coordinates and rows.
  float y_sums[kSums ? kChunks : 1][16] = {}, coefficient_sums[kSums ? kOwnGroups : 1][2] = {}, inverse_sum = 0.f;
  shared_writes_fence();
  __syncthreads();
  wait_phase(basis_loaded, 0);

  uint32_t parity = 0;
  for (; tile < tiles; tile += stride, parity ^= 1) {
    const int64_t first_row = tile * kTileRows;
    if (leader) {
      arrive_expecting(projected, (kCluster - 1) * kPartBytes);
      arrive_expecting(mapped, (kCluster - 1) * ((kBuilds ? kPartBytes / 2 : 0) + kNormsBytes));
    }

    // ---- p from this block's columns
    float own[kOwnGroups][4], tail[4] = {};  // y.offset and y.shift, in two pieces each
    {
      float part[68] = {};  // cleared, as a product that only ignores its sums still keeps their registers from the last tile
      wait_phase(loaded, parity);
      products_begin();
#pragma unroll
      for (int32_t step = 0; step < kChunks * 4; ++step) {
        project<S>(part, tile_operand + operand_offset(step / 4 * kTileChunkBytes + step % 4 * 32),
                   basis_operand + operand_offset(step * 16 * kPanelRowBytes));
      }
      products_commit();
      if (tile >= stride) wait_phase(exchange_free, parity ^ 1);
      products_wait();
      pin(part);

#pragma unroll
      for (int32_t i = 0; i < 4; ++i) tail[i] = part[64 + i];
#pragma unroll
      for (int32_t i = 0; i < kOwnGroups * 4; ++i) own[i / 4][i % 4] = part[i];
#pragma unroll
      for (uint32_t to = 1; to < kCluster; ++to) {
        const uint32_t barrier = remote_address(projected, ranks_on(to));
        const uint32_t target = remote_address(exchange + (kCluster - 1 - to) * kPartBytes + thread * 16, ranks_on(to));
#pragma unroll
        for (int32_t v = 0; v < kOwnGroups; ++v) {
          const float* values = &part[(to * kOwnGroups + v) * 4];
          store_remote(target + v * kWarpgroupThreads * 16, barrier, __float_as_uint(values[0]), __float_as_uint(values[1]),
                       __float_as_uint(values[2]), __float_as_uint(values[3]));
        }
      }
    }

    // ---- meanwhile s y into the sums
    const uint32_t matrix_row = warp * 16 + lane % 16, matrix_unit = lane / 16;
    float w[kChunks][32];
    uint32_t y_kept[kSums ? kChunks : 1][16];
    const auto for_each_y = [&](const auto& body) {  // body(chunk, group, two packed pairs of this thread)
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int32_t g = 0; g < 8; g += 2) {
          uint32_t fragment[4];
          load_matrices(tile_memory + c * kTileChunkBytes + matrix_row * 128 +
                            (((g + matrix_unit) ^ (matrix_row & 7)) * 16),
                        fragment);
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) {
            body(c, g + half, fragment[2 * half], fragment[2 * half + 1]);
          }
        }
      }
    };
    float squares[2] = {}, dot_shift[2] = {};  // of w, this block's part of them
    for_each_y([&](int32_t c, int32_t g, uint32_t upper_pair, uint32_t lower_pair) {
      const float2 upper = unpack<S>(upper_pair), lower = unpack<S>(lower_pair);
      if constexpr (kSums) {
        y_kept[c][2 * g] = upper_pair;
        y_kept[c][2 * g + 1] = lower_pair;
      } else {
        w[c][4 * g] = scalar * upper.x;
        w[c][4 * g + 1] = scalar * upper.y;
        w[c][4 * g + 2] = scalar * lower.x;
        w[c][4 * g + 3] = scalar * lower.y;
      }
      squares[0] = fmaf(upper.x, upper.x, fmaf(upper.y, upper.y, squares[0]));
      squares[1] = fmaf(lower.x, lower.x, fmaf(lower.y, lower.y, squares[1]));
    });
    if constexpr (kBuilds) {
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
    } else {
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(y_kept[c]);  // packed: unpacked they would not fit
    }
    reads_before_copy_fence();
    warpgroup_sync(warpgroup);  // every thread has read the tile
    if (leader && tile + stride < tiles) load_tile(tile + stride);

    // ---- the share of p that this block maps
    wait_phase(projected, parity);
#pragma unroll
    for (uint32_t s = 0; s < kCluster - 1; ++s) {
#pragma unroll
      for (int32_t v = 0; v < kOwnGroups; ++v) {
        const float4 part = load_shared(exchange + s * kPartBytes + (v * kWarpgroupThreads + thread) * 16);
        own[v][0] += part.x;
        own[v][1] += part.y;
        own[v][2] += part.z;
        own[v][3] += part.w;
      }
    }
    uint32_t own_k[kOwnSteps][4];
    float rank_squares[2] = {};
    const auto column_of = [&](int32_t g) { return g * 8 + lane_pair; };
#pragma unroll
    for (int32_t first = 0; first < kOwnGroups; first += kLookupGroups) {
      BlockLookup lookups[kLookupGroups][2];
      float radii[kLookupGroups][2];
      map_radii<kLookupGroups>(in, coordinates, int32_t(rank) * kOwnColumns, first, column_of, own, lookups, radii, [] {});
#pragma unroll
      for (int32_t i = 0; i < kLookupGroups; ++i) {
        const int32_t g = first + i;
        const float2 target = load_pair(coordinates.scaled_target + column_of(g)), cross = load_pair(coordinates.cross + column_of(g));
        const float2 shift = load_pair(coordinates.shift + column_of(g));
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const float a = own[g][2 * half], b = own[g][2 * half + 1], radius = radii[i][half];
          // T(rho) (cos, sin) - s c_t with c_t = (a, b) - t
          const Direction direction = direction_of(lookups[i][half], a, b);
          float2 kept = make_float2(fmaf(radius, direction.cos, fmaf(-scalar, a, target.x)),
                                    fmaf(radius, direction.sin, fmaf(-scalar, b, target.y)));
          if constexpr (kBuilds) {
            uint32_t& k = own_k[g / 2][g % 2 * 2 + half];
            k = pack<S>(kept.x, kept.y);
            kept = unpack<S>(k);  // the norms are those of the row that is built
          }
          rank_squares[half] = fmaf(kept.x, fmaf(2.f * scalar, a, cross.x) + kept.x, rank_squares[half]);
          rank_squares[half] = fmaf(kept.y, fmaf(2.f * scalar, b, cross.y) + kept.y, rank_squares[half]);
          dot_shift[half] = fmaf(kept.x, shift.x, fmaf(kept.y, shift.y, dot_shift[half]));
          if constexpr (kSums) own[g][2 * half] = kept.x, own[g][2 * half + 1] = kept.y;
        }
      }
    }

    // Only now, with the lookups behind it, whose addresses took every part: an arrival does not wait for loads under way, and
    // the others' k would meet parts that are still to be read.
    warp_tells_others(parts_read);

    // ---- k from all blocks
    const uint32_t norms_place = exchange + kNormsOffset + (warp * 8 + lane_row) * 16;
    float sums[4];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const float along = scalar * (tail[2 * half] + tail[2 * half + 1]);  // the first lane of a row has y.offset, the second y.shift
      squares[half] = fmaf(scalar * scalar, squares[half], rank_squares[half]) + (lane % 4 == 0 ? 2.f * along : 0.f);
      sums[2 * half] = sum_over_row(squares[half]);
      sums[2 * half + 1] = sum_over_row(dot_shift[half] + (lane % 4 == 1 ? along : 0.f));
    }
    wait_phase(parts_read, parity);
    if (lane % 4 == 0) {
#pragma unroll
      for (uint32_t to = 1; to < kCluster; ++to) {
        store_remote(remote_address(norms_place + (kCluster - 1 - to) * kNormsBytes, ranks_on(to)), remote_address(mapped, ranks_on(to)),
                     __float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]), __float_as_uint(sums[3]));
      }
    }
#pragma unroll
    for (uint32_t to = 1; to < (kBuilds ? kCluster : 1); ++to) {
      const uint32_t barrier = remote_address(mapped, ranks_on(to));
      const uint32_t target =
          remote_address(exchange + (kCluster - 1 - to) * (kPartBytes / 2) + thread * 16, ranks_on(to));
#pragma unroll
      for (int32_t i = 0; i < kOwnSteps; ++i) {
        const uint32_t(&k)[4] = own_k[i];
        store_remote(target + i * kWarpgroupThreads * 16, barrier, k[0], k[1], k[2], k[3]);
      }
    }
    // Both norms, from the sums of all blocks. In pairs, so that every block adds the same numbers in the same order and scales
    // alike.
    wait_phase(mapped, parity);
    float4 others[kCluster - 1];
#pragma unroll
    for (uint32_t from = 1; from < kCluster; ++from) others[from - 1] = load_shared(norms_place + (from - 1) * kNormsBytes);
    if constexpr (kCluster == 4) {
      sums[0] = (sums[0] + others[1].x) + (others[0].x + others[2].x);
      sums[1] = (sums[1] + others[1].y) + (others[0].y + others[2].y);
      sums[2] = (sums[2] + others[1].z) + (others[0].z + others[2].z);
      sums[3] = (sums[3] + others[1].w) + (others[0].w + others[2].w);
    } else {
      sums[0] += others[0].x;
      sums[1] += others[0].y;
      sums[2] += others[0].z;
      sums[3] += others[0].w;
    }
    Scales scales[2];
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      scales[half] = fast_scales(sums[2 * half] + offset_squares, sums[2 * half + 1] + offset_shift, shift_squares, shifted);
    }

    // ---- w += Q k, one group of products for each chunk, and with the tail offset + |w| shift
    if constexpr (kBuilds) {
      uint32_t k[kSteps][4], tail_k[4] = {};
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const float length = shifted ? scales[half].length : 0.f, high = rounded<S>(length);
        tail_k[half] = lane % 4 == 0 ? pack<S>(1.f, 1.f)
                                     : lane % 4 == 1 ? pack<S>(high, high) : lane % 4 == 2 ? pack<S>(length - high, 0.f) : 0;
      }
#pragma unroll
      for (int32_t step = 0; step < kSteps; ++step) {
        const int32_t from = step / kOwnSteps;
        if (from == 0) {
#pragma unroll
          for (int32_t j = 0; j < 4; ++j) k[step][j] = own_k[step][j];
        } else {
          load_shared(exchange + (from - 1) * (kPartBytes / 2) + (step % kOwnSteps * kWarpgroupThreads + thread) * 16, k[step]);
        }
      }
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
      products_begin();
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        const uint64_t rows = basis_operand + operand_offset(c * kChunkColumns * kPanelRowBytes);
#pragma unroll
        for (int32_t i = 0; i < kSteps; ++i) rebuild<S>(w[c], k[i], rows + operand_offset(i * Layout::kPanelBytes));
        rebuild<S>(w[c], tail_k, rows + operand_offset(Layout::kTail));
        products_commit();
      }
    }

    // ---- out
    if constexpr (kSums) {
      const int64_t row = first_row + warp * 16 + lane_row;
      const float upper = row < arguments.count ? scales[0].inverse : 0.f;
      const float lower = row + 8 < arguments.count ? scales[1].inverse : 0.f;
      const auto add_rows = [&](float& sum, float above, float below) { sum = fmaf(above, upper, fmaf(below, lower, sum)); };
      add_rows(inverse_sum, 1.f, 1.f);
#pragma unroll
      for (int32_t g = 0; g < kOwnGroups; ++g) {
        add_rows(coefficient_sums[g][0], own[g][0], own[g][2]);
        add_rows(coefficient_sums[g][1], own[g][1], own[g][3]);
      }
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int32_t g = 0; g < 8; ++g) {
          const float2 above = unpack<S>(y_kept[c][2 * g]), below = unpack<S>(y_kept[c][2 * g + 1]);
          add_rows(y_sums[c][2 * g], above.x, below.x);
          add_rows(y_sums[c][2 * g + 1], above.y, below.y);
        }
      }
    } else {
      const float factor[2] = {scales[0].inverse * scales[0].outer, scales[1].inverse * scales[1].outer};
      // Through what this warp received in the exchange, so that whole lines are written: 16 rows of 128 bytes a chunk.
      S* result = arguments.out + (first_row + warp * 16) * in.width + first_column;
      const int32_t columns_left = in.width - first_column;
      const int64_t rows_left = arguments.count - (first_row + warp * 16);
      const auto staged = [&](int32_t c, int32_t row, int32_t unit) {
        const int32_t piece = c % Layout::kStagingSlots * 4 + row / 4;
        return exchange + piece * kWarpgroupThreads * 16 + warp * 512 + row % 4 * 128 + ((unit ^ (row & 7)) * 16);
      };
      const auto stage = [&](int32_t c) {
#pragma unroll
        for (int32_t g = 0; g < 8; g += 2) {
          uint32_t fragment[4];
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) {
            const float* values = &w[c][4 * (g + half)];
            fragment[2 * half] = pack<S>(values[0] * factor[0], values[1] * factor[0]);
            fragment[2 * half + 1] = pack<S>(values[2] * factor[1], values[3] * factor[1]);
          }
          store_matrices(staged(c, lane % 16, g + lane / 16), fragment[0], fragment[1], fragment[2], fragment[3]);
        }
      };
      const int32_t unit = lane % 8;
      const auto send = [&](int32_t first, int32_t last) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const int32_t row = i * 4 + lane / 8;
          S* line = result + row * in.width + unit * 8;
          const int32_t left = row < rows_left ? columns_left - unit * 8 : 0;
#pragma unroll
          for (int32_t c = first; c < last; ++c) {
            const float4 values = load_shared(staged(c, row, unit));
            if (c * kChunkColumns < left) store_line(line + c * kChunkColumns, values);
          }
        }
      };
#pragma unroll
      for (int32_t first = 0; first < kChunks; first += Layout::kStagingSlots) {
        constexpr int32_t kSlots = Layout::kStagingSlots;
        const int32_t last = first + kSlots < kChunks ? first + kSlots : kChunks;
        __syncwarp();
#pragma unroll
        for (int32_t c = first; c < last; ++c) {
          products_wait(kChunks - 1 - c);
          pin(w[c]);
          stage(c);
        }
        __syncwarp();
        send(first, last);
      }
    }
    warp_tells_others(exchange_free);
  }

  if constexpr (kSums) {
    const int32_t slot = (int32_t(cluster_index()) * Layout::kWarpgroups + warpgroup) * kWarps + warp;
    float* partial = arguments.partial + int64_t(slot) * (in.width + kSm90SumColumns);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int32_t side = 0; side < 2; ++side) {
        float values[8];
#pragma unroll
        for (int32_t g = 0; g < 8; ++g) values[g] = y_sums[c][2 * g + side];
        const int32_t column = first_column + c * kChunkColumns + lane_row * 8 + lane_pair + side;
        const float sum = scalar * sum_over_column(values, lane_row);
        if (column < in.width) partial[column] = sum;
      }
    }
#pragma unroll
    for (int32_t g = 0; g < kOwnGroups; ++g) {
#pragma unroll
      for (int32_t side = 0; side < 2; ++side) {
        const float sum = sum_over_rows(coefficient_sums[g][side]);
        if (lane_row == 0) partial[in.width + int32_t(rank) * kOwnColumns + g * 8 + lane_pair + side] = sum;
      }
    }
    const float sum = sum_over_rows(inverse_sum);
    if (lane == 0 && rank == 0) partial[in.width + kRank] = sum;
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
