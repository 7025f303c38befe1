// The closed form on Hopper: one read and one write of each row, the basis resident in shared memory (METHOD section 4).
//
//   p = Q^T y        c_t = p + bias        k = T(rho) (cos, sin) - s c_t        w = Q k + s y + offset
//   e' = w/|w|       e = Norm(e' + shift)                       diagonal: w = Q T(rho) (cos, sin) + D (y - Q c_t) + offset
//
// Shapes   y, out [N, D]; Q [D, R], R <= 128, D <= 1280; cells [M, G + 1].
// Grid     clusters of 2 or 4 blocks, as many as fit the device, each over tiles of 64 rows. Block c of a cluster owns the
//          columns [64 kChunks c, 64 kChunks (c + 1)) of its tiles and of Q, so that Q fits: it is loaded once and serves
//          both products. Warpgroups of a block work on tiles of their own and cover each other's waits.
// A tile   1 the copy engine brings 64 rows; 2 partial p from the block's columns, and y.offset and y.shift with it; 3 each block
//          collects its share of p from the others, 4 maps its blocks of the rank, 5 hands k and its part of both norms' sums to
//          the others; meanwhile s y waits in registers and the next tile is on its way; 6 w on top of that, the offset and
//          |w| shift with it; 7 out. The diagonal complement adds offset and shift itself, and exchanges the sums after 6. Sums of e'
//          need no rows: k, y and 1 over |w| are added up, and Q meets the sum over all rows, so that 5 hands on the sums alone.
// Shared   Q and the tail: 18 KB a chunk of 64 columns. For each warpgroup 8 KB of rows a chunk, and up to 26 KB that carry in
//          turn the parts of p, of k with the sums, and the finished rows on their way out.
// Registers  w stays in fp32: 32 kChunks a thread. Nothing is rounded but k and the result. Kernels of the scalar complement do
//          not spill (one word at D 512), those of the diagonal one up to 75 words, because c^ and c_t wait beside w.
// Norms    |w|^2 = k.k + 2 k.(s p + Q^T offset) + |s y + offset|^2 and w.shift = k.Q^T shift + (s y + offset).shift, as Q^T Q = I;
//          of the diagonal complement they are sums over w.
// Global   2 D storage values, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster
//          of C go (C - 1) R (4 + 2) bytes for each row.
// FLOP     4 D R for each row, 6 D R for the diagonal complement, 2 D R for the sums.
#pragma once

#include "sm90_layout.cuh"
#include "sm90_pieces.cuh"

namespace aniso::sm90 {

template <typename S, int kCluster, int kChunks, Result kResult, bool kDiagonal>
__global__ void __launch_bounds__(kWarpgroups* kWarpgroupThreads, 1)
    sm90_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                const __grid_constant__ Arguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = Shared<kCluster, kChunks, kDiagonal>;
  constexpr uint32_t kPartBytes = Layout::kPartBytes, kNormsOffset = Layout::kNormsOffset;
  constexpr int32_t kOwnColumns = kRank / kCluster;       // of p, that a block maps; first in the order of its basis
  constexpr int32_t kOwnGroups = kOwnColumns / 8;
  // Groups of columns whose pieces of the radius map a thread awaits at once: as many as the registers have room for.
  constexpr int32_t kLookupGroups = kResult == Result::kState ? kCluster / 2 : 4;
  constexpr int32_t kKinds = kDiagonal ? 2 : 1;           // c^ alone, or c^ and c_t
  constexpr int32_t kOwnSteps = kSteps / kCluster;
  // Norms of a scalar complement follow from p, k and y; those of a diagonal one are summed from w.
  constexpr bool kForms = !kDiagonal && kResult != Result::kState;
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
  auto& vectors = *reinterpret_cast<ColumnVectors<kChunks>*>(shared_memory + Layout::kColumns);
  const uint32_t barriers = shared + Layout::kBarriers + warpgroup * uint32_t(sizeof(Barriers));
  const uint32_t loaded = barriers + offsetof(Barriers, loaded), projected = barriers + offsetof(Barriers, projected);
  const uint32_t mapped = barriers + offsetof(Barriers, mapped), summed = barriers + offsetof(Barriers, summed);
  const uint32_t parts_read = barriers + offsetof(Barriers, parts_read);
  const uint32_t exchange_free = barriers + offsetof(Barriers, exchange_free);
  const uint64_t tile_operand = wide_operand(tile_memory), basis_operand = narrow_operand(basis, Layout::kPanelBytes);
  const uint32_t basis_loaded = shared + Layout::kBarriers + kWarpgroups * uint32_t(sizeof(Barriers));
  const int32_t first_column = int32_t(rank) * kChunks * kChunkColumns;

  if (leader) {
    for (const uint32_t barrier : {loaded, projected, mapped, summed}) barrier_init(barrier, 1);
    barrier_init(parts_read, (kCluster - 1) * kWarps);  // from every warp of the others
    barrier_init(exchange_free, (kCluster - 1) * kWarps);
    if (warpgroup == 0) barrier_init(basis_loaded, 1);
    barrier_init_fence();
  }
  cluster_sync();

  const int64_t tiles = (arguments.count + kTileRows - 1) / kTileRows;
  const int64_t stride = int64_t(cluster_count()) * kWarpgroups;
  int64_t tile = int64_t(cluster_index()) * kWarpgroups + warpgroup;

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
  const float scalar = kDiagonal ? 0.f : in.scale[0];
  for (int32_t j = threadIdx.x; j < kChunks * kChunkColumns; j += blockDim.x) {
    const int32_t column = first_column + j;
    const float offset = column < in.width ? in.offset[column] : 0.f;
    const float shift = shifted && column < in.width ? in.shift[column] : 0.f;
    if constexpr (kDiagonal) {
      vectors.offset[j] = offset;
      vectors.shift[j] = shift;
      vectors.scale[j] = column < in.width ? in.scale[column] : 0.f;
    } else {
      const float offset_high = rounded<S>(offset), shift_high = rounded<S>(shift);
      const uint32_t row = shared + Layout::kTail + j * kPanelRowBytes, first_half = (j / 4 % 2) * 16;
      store_shared(row + first_half, pack<S>(offset_high, offset - offset_high), pack<S>(shift_high, shift - shift_high),
                   pack<S>(shift_high, 0.f), 0);
      store_shared(row + (first_half ^ 16), 0, 0, 0, 0);
    }
  }
  for (int32_t j = threadIdx.x; j < kOwnColumns; j += blockDim.x) {
    const int32_t column = int32_t(rank) * kOwnColumns + j;
    const bool inside = column < in.rank;
    const float target = inside ? in.target_coordinates[column] : 0.f;
    const float turned_bias = inside ? in.input_bias[column] + target : 0.f;
    coordinates.turned_bias[j] = turned_bias;
    coordinates.scaled_target[j] = kDiagonal ? target : scalar * target;
    coordinates.cross[j] = kForms && inside ? 2.f * (in.offset_coordinates[column] - scalar * turned_bias) : 0.f;
    coordinates.shift[j] = kForms && inside && shifted ? in.shift_coordinates[column] : 0.f;
    if (j % 2 == 0) coordinates.cell_scale[j / 2] = in.map_scales[column / 2];
    coordinates.map[j] = in.map_scales[(1 + j % 2) * (kRank / 2) + column / 2];
  }
  float offset_squares = 0.f, offset_shift = 0.f, shift_squares = 0.f;
  for (int32_t j = lane; j < in.width; j += 32) {
    const float offset = in.offset[j], shift = shifted ? in.shift[j] : 0.f;
    offset_squares += offset * offset;
    offset_shift += offset * shift;
    shift_squares += shift * shift;
  }
  for (int32_t step = 16; step > 0; step /= 2) {
    offset_squares += __shfl_xor_sync(0xffffffffu, offset_squares, step);
    offset_shift += __shfl_xor_sync(0xffffffffu, offset_shift, step);
    shift_squares += __shfl_xor_sync(0xffffffffu, shift_squares, step);
  }
  // kSums: of y, k and 1 over |w|, for this thread's columns, coordinates and rows.
  float y_sums[kSums ? kChunks : 1][16] = {}, coefficient_sums[kSums ? kOwnGroups : 1][2] = {}, inverse_sum = 0.f;
  const uint32_t* own_cells = in.cells + (int32_t(rank) * (kRank / 2 / kCluster) + lane_pair / 2) * (in.cell_count + 1);
  shared_writes_fence();
  __syncthreads();
  wait_phase(basis_loaded, 0);

  uint32_t parity = 0;
  for (; tile < tiles; tile += stride, parity ^= 1) {
    const int64_t first_row = tile * kTileRows;
    if (leader) {
      arrive_expecting(projected, (kCluster - 1) * kPartBytes);
      arrive_expecting(mapped, (kCluster - 1) * ((kBuilds ? kPartBytes / 2 * kKinds : 0) + (kForms ? kNormsBytes : 0)));
      if (kDiagonal) arrive_expecting(summed, (kCluster - 1) * kNormsBytes);
    }

    // ---- p from this block's columns
    float own[kOwnGroups][4], tail[4] = {};  // y.offset and y.shift, in two pieces each
    {
      float part[kForms ? 68 : 64] = {};  // cleared, as a product that only ignores its sums still keeps their registers from the last tile
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

      if constexpr (kForms) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) tail[i] = part[64 + i];
      }
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

    // ---- meanwhile s y into the sums; the diagonal complement still needs the row itself
    const uint32_t matrix_row = warp * 16 + lane % 16, matrix_unit = lane / 16;
    float w[kChunks][32];
    uint32_t y_kept[kSums ? kChunks : 1][16];
    const auto for_each_y = [&](const auto& body) {  // body(chunk, group, two packed pairs of this thread, column)
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
            body(c, g + half, fragment[2 * half], fragment[2 * half + 1], c * kChunkColumns + (g + half) * 8 + lane_pair);
          }
        }
      }
    };
    const auto prefetch = [&] {
      reads_before_copy_fence();
      warpgroup_sync(warpgroup);  // every thread has read the tile
      if (leader && tile + stride < tiles) load_tile(tile + stride);
    };
    float squares[2] = {}, dot_shift[2] = {};  // of w, this block's part of them
    if constexpr (!kDiagonal) {
      for_each_y([&](int32_t c, int32_t g, uint32_t upper_pair, uint32_t lower_pair, int32_t) {
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
        if constexpr (kForms) {
          squares[0] = fmaf(upper.x, upper.x, fmaf(upper.y, upper.y, squares[0]));
          squares[1] = fmaf(lower.x, lower.x, fmaf(lower.y, lower.y, squares[1]));
        }
      });
      if constexpr (kBuilds) {
#pragma unroll
        for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
      } else {
#pragma unroll
        for (int32_t c = 0; c < kChunks; ++c) pin(y_kept[c]);  // packed: unpacked they would not fit
      }
      prefetch();
    }

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
    uint32_t own_k[kKinds][kOwnSteps][4];
    float rank_squares[2] = {};
#pragma unroll
    for (int32_t first = 0; first < kOwnGroups; first += kLookupGroups) {
      BlockLookup lookups[kLookupGroups][2];
#pragma unroll
      for (int32_t i = 0; i < kLookupGroups; ++i) {
        const int32_t g = first + i, own_column = g * 8 + lane_pair;
        const float2 turned_bias = load_pair(coordinates.turned_bias + own_column);
        const float cell_scale = coordinates.cell_scale[own_column / 2];
        const uint32_t* cells = own_cells + (4 * g) * (in.cell_count + 1);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          own[g][2 * half] += turned_bias.x;
          own[g][2 * half + 1] += turned_bias.y;
          lookups[i][half] = look_up(cells, cell_scale, in.cell_count, own[g][2 * half], own[g][2 * half + 1]);
        }
      }
      bool coarse = false;
      float radii[kLookupGroups][2];
#pragma unroll
      for (int32_t i = 0; i < kLookupGroups; ++i) {
        const float2 map = load_pair(coordinates.map + (first + i) * 8 + lane_pair);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          coarse = coarse || is_coarse(lookups[i][half].cell);
          radii[i][half] = mapped_radius(lookups[i][half], map.x, map.y);
        }
      }
      if (__any_sync(0xffffffffu, coarse)) {
#pragma unroll
        for (int32_t i = 0; i < kLookupGroups; ++i) {
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) {
            if (!is_coarse(lookups[i][half].cell)) continue;
            const int32_t index = (int32_t(rank) * kOwnColumns + (first + i) * 8 + lane_pair) / 2;
            radii[i][half] = search_map(in, index, lookups[i][half].rho);
          }
        }
      }
#pragma unroll
      for (int32_t i = 0; i < kLookupGroups; ++i) {
        const int32_t g = first + i, own_column = g * 8 + lane_pair;
        const float2 target = load_pair(coordinates.scaled_target + own_column);
        float2 cross = {}, shift = {};
        if constexpr (kForms) {
          cross = load_pair(coordinates.cross + own_column);
          shift = load_pair(coordinates.shift + own_column);
        }
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const BlockLookup& block = lookups[i][half];
          const float a = own[g][2 * half], b = own[g][2 * half + 1];
          const bool at_origin = block.inverse > 1e18f;  // a^2 + b^2 is zero or below the normal numbers
          const float radius = radii[i][half];
          uint32_t& k = own_k[0][g / 2][g % 2 * 2 + half];
          if constexpr (kResult == Result::kState) {
            const float cos = at_origin ? 1.f : a * block.inverse, sin = at_origin ? 0.f : b * block.inverse;
            const int64_t row = first_row + warp * 16 + half * 8 + lane_row;
            const int32_t blocks = in.rank / 2, index = (int32_t(rank) * kOwnColumns + own_column) / 2;
            if (index < blocks && row < arguments.count) {
              uint16_t* state = reinterpret_cast<uint16_t*>(arguments.out) + row * arguments.out_stride + index;
              const uint32_t direction = pack<S>(sin, cos), length = pack<S>(logf(radius), 0.f);
              state[0] = uint16_t(direction);
              state[blocks] = uint16_t(direction >> 16);
              state[2 * blocks] = uint16_t(length);
            }
            k = pack<S>(fmaf(-scalar, a, target.x), fmaf(-scalar, b, target.y));
          } else if constexpr (kDiagonal) {
            const float ratio = radius * block.inverse;
            k = pack<S>(at_origin ? radius : ratio * a, at_origin ? 0.f : ratio * b);
            own_k[1][g / 2][g % 2 * 2 + half] = pack<S>(a - target.x, b - target.y);
          } else {
            // T(rho) (cos, sin) - s c_t with c_t = (a, b) - t
            const float ratio = radius * block.inverse - scalar;
            float2 kept = make_float2(at_origin ? radius + target.x : fmaf(ratio, a, target.x),
                                      at_origin ? target.y : fmaf(ratio, b, target.y));
            if constexpr (kBuilds) {
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
    }

    // Only now, with the lookups behind it, whose addresses took every part: an arrival does not wait for loads under way, and
    // the others' k would meet parts that are still to be read.
    warp_tells_others(parts_read);

    // ---- k from all blocks
    const uint32_t norms_place = exchange + kNormsOffset + (warp * 8 + lane_row) * 16;
    const auto send_sums = [&](const float(&sums)[4], uint32_t barrier) {
      if (lane % 4 != 0) return;
#pragma unroll
      for (uint32_t to = 1; to < kCluster; ++to) {
        store_remote(remote_address(norms_place + (kCluster - 1 - to) * kNormsBytes, ranks_on(to)),
                     remote_address(barrier, ranks_on(to)), __float_as_uint(sums[0]), __float_as_uint(sums[1]),
                     __float_as_uint(sums[2]), __float_as_uint(sums[3]));
      }
    };
    float sums[4] = {};
    if constexpr (kForms) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const float along = scalar * (tail[2 * half] + tail[2 * half + 1]);  // the first lane of a row has y.offset, the second y.shift
        squares[half] = fmaf(scalar * scalar, squares[half], rank_squares[half]) + (lane % 4 == 0 ? 2.f * along : 0.f);
        sums[2 * half] = sum_over_row(squares[half]);
        sums[2 * half + 1] = sum_over_row(dot_shift[half] + (lane % 4 == 1 ? along : 0.f));
      }
    }
    wait_phase(parts_read, parity);
    if constexpr (kForms) send_sums(sums, mapped);
#pragma unroll
    for (uint32_t to = 1; to < (kBuilds ? kCluster : 1); ++to) {
      const uint32_t barrier = remote_address(mapped, ranks_on(to));
      const uint32_t target =
          remote_address(exchange + (kCluster - 1 - to) * (kPartBytes / 2 * kKinds) + thread * 16, ranks_on(to));
#pragma unroll
      for (int32_t i = 0; i < kKinds * kOwnSteps; ++i) {
        const uint32_t(&k)[4] = own_k[i / kOwnSteps][i % kOwnSteps];
        store_remote(target + i * kWarpgroupThreads * 16, barrier, k[0], k[1], k[2], k[3]);
      }
    }
    // Both norms, from the sums of all blocks. In pairs, so that every block adds the same numbers in the same order and scales
    // alike.
    const auto scales_of_rows = [&](Scales(&scales)[2]) {
      float4 others[kCluster - 1];
#pragma unroll
      for (uint32_t from = 1; from < kCluster; ++from) others[from - 1] = load_shared(norms_place + (from - 1) * kNormsBytes);
      float total[4];
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
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        scales[half] = fast_scales(total[2 * half] + (kForms ? offset_squares : 0.f),
                                   total[2 * half + 1] + (kForms ? offset_shift : 0.f), shift_squares, shifted);
      }
    };
    Scales scales[2] = {};
    wait_phase(mapped, parity);
    uint32_t tail_k[4] = {};
    if constexpr (kForms) scales_of_rows(scales);
    if constexpr (!kDiagonal && kBuilds) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const float length = kResult == Result::kRows && shifted ? scales[half].length : 0.f, high = rounded<S>(length);
        tail_k[half] = lane % 4 == 0 ? pack<S>(1.f, 1.f)
                                     : lane % 4 == 1 ? pack<S>(high, high) : lane % 4 == 2 ? pack<S>(length - high, 0.f) : 0;
      }
    }
    // w += Q k, one group of products for each chunk. Both kinds of k do not fit the registers at once with w: they come in
    // halves then.
    constexpr int32_t kParts = kDiagonal ? 2 : 1;
    const auto start_rebuild = [&](int32_t kind, int32_t part) {
      uint32_t k[kSteps / kParts][4];
#pragma unroll
      for (int32_t i = 0; i < kSteps / kParts; ++i) {
        const int32_t step = part * (kSteps / kParts) + i, from = step / kOwnSteps;
        if (from == 0) {
#pragma unroll
          for (int32_t j = 0; j < 4; ++j) k[i][j] = own_k[kind][step][j];
        } else {
          const float4 theirs = load_shared(exchange + (from - 1) * (kPartBytes / 2 * kKinds) +
                                            ((kind * kOwnSteps + step % kOwnSteps) * kWarpgroupThreads + thread) * 16);
          k[i][0] = __float_as_uint(theirs.x);
          k[i][1] = __float_as_uint(theirs.y);
          k[i][2] = __float_as_uint(theirs.z);
          k[i][3] = __float_as_uint(theirs.w);
        }
      }
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
      products_begin();
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        const uint64_t rows = basis_operand + operand_offset(c * kChunkColumns * kPanelRowBytes);
#pragma unroll
        for (int32_t i = 0; i < kSteps / kParts; ++i) {
          rebuild<S>(w[c], k[i], rows + operand_offset((part * (kSteps / kParts) + i) * Layout::kPanelBytes));
        }
        if constexpr (!kDiagonal) rebuild<S>(w[c], tail_k, rows + operand_offset(Layout::kTail));
        products_commit();
      }
    };
    const auto wait_chunk = [&](int32_t c) {
      products_wait(kChunks - 1 - c);
      pin(w[c]);
    };
    const auto wait_chunks = [&] {
      products_wait(0);
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
    };

    // ---- w
    if constexpr (kDiagonal) {
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int32_t i = 0; i < 32; ++i) w[c][i] = 0.f;
      }
#pragma unroll
      for (int32_t part = 0; part < kParts; ++part) {
        start_rebuild(1, part);
        wait_chunks();
      }
      for_each_y([&](int32_t c, int32_t g, uint32_t upper_pair, uint32_t lower_pair, int32_t column) {
        const float2 upper = unpack<S>(upper_pair), lower = unpack<S>(lower_pair);
        const float2 offset = load_pair(vectors.offset + column), scale = load_pair(vectors.scale + column);
        w[c][4 * g] = fmaf(scale.x, upper.x - w[c][4 * g], offset.x);
        w[c][4 * g + 1] = fmaf(scale.y, upper.y - w[c][4 * g + 1], offset.y);
        w[c][4 * g + 2] = fmaf(scale.x, lower.x - w[c][4 * g + 2], offset.x);
        w[c][4 * g + 3] = fmaf(scale.y, lower.y - w[c][4 * g + 3], offset.y);
      });
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) pin(w[c]);
      prefetch();
    }
#pragma unroll
    for (int32_t part = 0; part < (kBuilds ? kParts : 0); ++part) {
      if (part > 0) wait_chunks();
      start_rebuild(0, part);
    }

    // ---- both norms of the diagonal complement
    if constexpr (kDiagonal) {
#pragma unroll
      for (int32_t c = 0; c < kChunks; ++c) {
        wait_chunk(c);
#pragma unroll
        for (int32_t g = 0; g < 8; ++g) {
          const float* values = &w[c][4 * g];
          if (shifted) {
            const float2 shift = load_pair(vectors.shift + c * kChunkColumns + g * 8 + lane_pair);
            dot_shift[0] = fmaf(values[0], shift.x, fmaf(values[1], shift.y, dot_shift[0]));
            dot_shift[1] = fmaf(values[2], shift.x, fmaf(values[3], shift.y, dot_shift[1]));
          }
          squares[0] = fmaf(values[0], values[0], fmaf(values[1], values[1], squares[0]));
          squares[1] = fmaf(values[2], values[2], fmaf(values[3], values[3], squares[1]));
        }
      }
      sums[0] = sum_over_row(squares[0]), sums[1] = sum_over_row(dot_shift[0]);
      sums[2] = sum_over_row(squares[1]), sums[3] = sum_over_row(dot_shift[1]);
      send_sums(sums, summed);
      wait_phase(summed, parity);
      scales_of_rows(scales);
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
      float factor[2] = {1.f, 1.f}, shift_factor[2] = {};
      if constexpr (kResult == Result::kRows) {
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          factor[half] = scales[half].inverse * scales[half].outer;
          shift_factor[half] = scales[half].outer;
        }
      }
      // Through what this warp received in the exchange, so that whole lines are written: 16 rows of 128 bytes a chunk.
      S* result = arguments.out + (first_row + warp * 16) * arguments.out_stride + first_column;
      if constexpr (kResult == Result::kState) result += in.rank / 2 * 3;
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
            if constexpr (kDiagonal) {
              float2 shift = make_float2(0.f, 0.f);
              if (shifted) shift = load_pair(vectors.shift + c * kChunkColumns + (g + half) * 8 + lane_pair);
              fragment[2 * half] = pack<S>(fmaf(values[0], factor[0], shift.x * shift_factor[0]),
                                           fmaf(values[1], factor[0], shift.y * shift_factor[0]));
              fragment[2 * half + 1] = pack<S>(fmaf(values[2], factor[1], shift.x * shift_factor[1]),
                                               fmaf(values[3], factor[1], shift.y * shift_factor[1]));
            } else if constexpr (kResult == Result::kState) {
              fragment[2 * half] = pack<S>(values[0], values[1]);
              fragment[2 * half + 1] = pack<S>(values[2], values[3]);
            } else {
              fragment[2 * half] = pack<S>(values[0] * factor[0], values[1] * factor[0]);
              fragment[2 * half + 1] = pack<S>(values[2] * factor[1], values[3] * factor[1]);
            }
          }
          store_matrices(staged(c, lane % 16, g + lane / 16), fragment[0], fragment[1], fragment[2], fragment[3]);
        }
      };
      const int32_t unit = lane % 8;
      const auto send = [&](int32_t first, int32_t last) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const int32_t row = i * 4 + lane / 8;
          S* line = result + row * arguments.out_stride + unit * 8;
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
          if constexpr (!kDiagonal) wait_chunk(c);
          stage(c);
        }
        __syncwarp();
        send(first, last);
      }
    }
    warp_tells_others(exchange_free);
  }

  if constexpr (kSums) {
    const int32_t slot = (int32_t(cluster_index()) * kWarpgroups + warpgroup) * kWarps + warp;
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
