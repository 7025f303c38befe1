// The closed form on Hopper where the basis is too large to stay in shared memory (METHOD section 4): ranks up to 256, any width.
//
//   p = Q^T y        c_t = p + bias        k = T(rho) (cos, sin) - s c_t        w = Q k + s y + offset
//   e' = w/|w|       e = Norm(e' + shift)                       s: a number
//   |w|^2 = k.k + 2 k.(s p + Q^T offset) + |s y + offset|^2     w.shift = k.Q^T shift + (s y + offset).shift     as Q^T Q = I
//
// Shapes   y, out [N, D]; Q [D, kColumns], R <= kColumns; cells [M, G + 1].
// Grid     pairs of blocks, as many as fit the device; a block takes tiles of 128 rows, its two warpgroups 64 each.
// A tile   1 for every chunk of 64 columns the copy engine brings y and Q, and p grows by their product; 2 the radius map, k and both
//          norms, as a thread has every fourth coordinate of its rows; 3 for every chunk y, mostly from L2, and Q come once more:
//          w, scaled, goes out. Nothing of the rows is kept in between, and nothing is exchanged between warps.
// Shared   a ring of stages, each of a chunk of y and one of Q, that a warp of its own fills as the others release them. The blocks of a
//          pair fetch half of Q each and send it to both, so that L2 gives each chunk once for 256 rows.
// Registers  p in fp32, kColumns / 2 a thread; then k, packed, and two chunks of w. Nothing is rounded but k and the result.
// Global   2 D storage values, and D more from L2; 8 R D / 256 bytes of Q and 4 M of the radius map a row from L2.
// FLOP     4 D R for each row.
#pragma once

#include "sm90_radius.cuh"

namespace aniso::sm90 {

template <typename S>
struct StreamArguments {
  Sm90Operands<S> in;  // `shuffled` in the order of its rows alone, [sm90_padded(D), kColumns]; cells and map_scales of kColumns / 2 blocks
  int64_t count;
  int32_t stages;   // of the ring
  int32_t columns;  // stream_columns(D)
  S* out;           // [N, D]
};

constexpr int32_t kStreamCluster = 2, kStreamGroups = 2, kMostStages = 6;

// The columns that the second pass goes over: pairs of chunks.
constexpr int32_t stream_columns(int32_t width) { return (width + 2 * kChunkColumns - 1) / (2 * kChunkColumns) * (2 * kChunkColumns); }

template <int kColumns>
struct StreamShared {
  static constexpr int32_t kThreads = (kStreamGroups + 1) * kWarpgroupThreads, kWarpgroups = kStreamGroups * kStreamCluster;
  static constexpr uint32_t kRowsBytes = kStreamGroups * kTileChunkBytes;
  static constexpr int32_t kPieceColumns = 64;  // of Q, whose rows in a piece have 128 bytes
  static constexpr int32_t kPieces = kColumns / kPieceColumns;
  static constexpr uint32_t kPieceRowBytes = kPieceColumns * 2, kPieceBytes = kChunkColumns * kPieceRowBytes;
  static constexpr uint32_t kStageBytes = kRowsBytes + kPieces * kPieceBytes;
  static constexpr uint32_t kLimit = 232448;  // a block has 227 KB of shared memory

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
};

// A place in the ring, and the parity of its barriers there.
struct RingPlace {
  int32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int32_t stages) {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

template <typename S, int kColumns>
__global__ void __launch_bounds__(StreamShared<kColumns>::kThreads, 1)
    sm90_stream_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                       const __grid_constant__ CUtensorMap shuffled_map,
                       const __grid_constant__ StreamArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = StreamShared<kColumns>;
  constexpr int32_t kGroups = kColumns / 8, kAll = kColumns / 16;
  constexpr int32_t kLookupGroups = 8;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  const int32_t stages = arguments.stages, columns = arguments.columns, chunks = (in.width + kChunkColumns - 1) / kChunkColumns;
  const uint32_t ring = shared_address(shared_memory);
  auto& rest = *reinterpret_cast<typename Layout::Rest*>(shared_memory + stages * Layout::kStageBytes);
  const uint32_t vectors = shared_address(&rest + 1), vector_bytes = columns * 4;
  const int32_t warp = __shfl_sync(0xffffffffu, int32_t(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const uint32_t block = cluster_rank();
  const auto stage = [&](int32_t slot) { return ring + slot * Layout::kStageBytes; };
  const auto full = [&](int32_t slot) { return shared_address(&rest.full[slot]); };
  const auto empty = [&](int32_t slot) { return shared_address(&rest.empty[slot]); };

  if (threadIdx.x == 0) {
    for (int32_t slot = 0; slot < stages; ++slot) {
      barrier_init(full(slot), 1);
      barrier_init(empty(slot), kStreamCluster * kStreamGroups * kWarps);
    }
    barrier_init_fence();
  }
  for (int32_t j = threadIdx.x; j < columns; j += blockDim.x) {
    store_shared(vectors + j * 4, j < in.width ? in.offset[j] : 0.f);
    store_shared(vectors + vector_bytes + j * 4, j < in.width && in.shift != nullptr ? in.shift[j] : 0.f);
  }
  fill<kColumns>(rest.coordinates, in, 0);
  cluster_sync();

  const int64_t tiles = (arguments.count + kStreamGroups * kTileRows - 1) / (kStreamGroups * kTileRows);
  const int64_t pairs = (tiles + kStreamCluster - 1) / kStreamCluster;
  RingPlace place;

  if (warp >= kStreamGroups * kWarps) {
    // ---- the warp that fills the ring; its warpgroup leaves registers to the others
    give_registers<40>();
    if (warp == kStreamGroups * kWarps && lane == 0) {
      const uint64_t once_more = evicted_last(), last_time = evicted_first();
      for (int64_t pair = cluster_index(); pair < pairs; pair += cluster_count()) {
        const int32_t first_row = int32_t((pair * kStreamCluster + block) * kStreamGroups * kTileRows);
        const auto fill_stage = [&](int32_t column, uint64_t policy, const auto& load_piece) {
          wait_phase(empty(place.slot), place.parity ^ 1);
          arrive_expecting(full(place.slot), Layout::kStageBytes);
          const uint32_t to = stage(place.slot);
          for (int32_t g = 0; g < kStreamGroups; ++g) {
            load_box(to + g * kTileChunkBytes, rows_map, column, first_row + g * kTileRows, full(place.slot), policy);
          }
          for (int32_t i = 0; i < Layout::kPieces / kStreamCluster; ++i) {
            const int32_t piece = int32_t(block) * (Layout::kPieces / kStreamCluster) + i;
            load_piece(piece, to + Layout::kRowsBytes + piece * Layout::kPieceBytes);
          }
          place.advance(stages);
        };
        for (int32_t column = 0; column < chunks * kChunkColumns; column += kChunkColumns) {
          fill_stage(column, once_more, [&](int32_t piece, uint32_t to) {
            load_box_to_all(to, basis_map, piece * Layout::kPieceColumns, column, full(place.slot), (1 << kStreamCluster) - 1);
          });
        }
        for (int32_t column = 0; column < columns; column += kChunkColumns) {
          const int32_t first = column / kChunkColumns % 2;
          fill_stage(column, last_time, [&](int32_t piece, uint32_t to) {
            load_box_to_all(to, shuffled_map, first * (kColumns / 2) + piece / 2 * Layout::kPieceColumns,
                            column + (piece % 2 - first) * kChunkColumns,
                            full(place.slot), (1 << kStreamCluster) - 1);
          });
        }
      }
    }
    __syncwarp();
    cluster_sync();
    return;
  }

  // ---- the warps that multiply
  take_registers<232>();
  const int32_t warpgroup = warp / kWarps, quarter = lane % 4;
  const int32_t first_of_warp = warp % kWarps * 16 + lane / 4;
  const uint64_t last_time = evicted_first();
  const float scalar = in.scale[0];
  const bool shifted = in.shift != nullptr;
  const float offset_squares = dot_of(in.offset, in.offset, in.width, lane), shift_squares = dot_of(in.shift, in.shift, in.width, lane);
  const float offset_shift = dot_of(in.offset, in.shift, in.width, lane);

  const auto release = [&](int32_t slot) {
    reads_before_copy_fence();
    __syncwarp();
    if (lane < kStreamCluster) arrive_remote(remote_address(empty(slot), lane));
  };
  // What a thread holds of a chunk of its rows: of two rows eight apart, eight neighbours in each half.
  const auto load_piece = [&](int32_t slot, int32_t half, int32_t piece, uint32_t(&pairs)[4]) {
    const int32_t row = first_of_warp + half * 8;
    load_shared(stage(slot) + warpgroup * kTileChunkBytes + row * 128 + (((piece * 4 + quarter) ^ (row & 7)) * 16), pairs);
  };
  const auto load_vector = [&](uint32_t vector, int32_t c, int32_t piece, float(&values)[8]) {
    load_shared(vector + (c * kChunkColumns + piece * 32 + quarter * 8) * 4, values);
  };

  for (int64_t pair = cluster_index(); pair < pairs; pair += cluster_count()) {
    const int64_t first_row = ((pair * kStreamCluster + block) * kStreamGroups + warpgroup) * kTileRows + first_of_warp;

    // ---- p, and y.y, y.offset and y.shift
    float p[kColumns / 2] = {}, dots[2][3] = {};
    for (int32_t c = 0; c < chunks; ++c, place.advance(stages)) {
      wait_phase(full(place.slot), place.parity);
      pin(p);
      products_begin();
      const uint64_t rows = wide_operand(stage(place.slot) + warpgroup * kTileChunkBytes);
      const uint64_t basis = rank_operand(stage(place.slot) + Layout::kRowsBytes, Layout::kPieceBytes);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) project<S>(p, rows + operand_offset(i * 32), basis + operand_offset(i * 16 * Layout::kPieceRowBytes));
      products_commit();
#pragma unroll
      for (int32_t piece = 0; piece < 2; ++piece) {
        float offset[8], shift[8];
        load_vector(vectors, c, piece, offset);
        load_vector(vectors + vector_bytes, c, piece, shift);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          uint32_t y[4];
          load_piece(place.slot, half, piece, y);
          float(&of)[3] = dots[half];
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) {
            const float2 value = unpack<S>(y[i]);
            of[0] = fmaf(value.x, value.x, fmaf(value.y, value.y, of[0]));
            of[1] = fmaf(value.x, offset[2 * i], fmaf(value.y, offset[2 * i + 1], of[1]));
            of[2] = fmaf(value.x, shift[2 * i], fmaf(value.y, shift[2 * i + 1], of[2]));
          }
        }
      }
      products_wait();
      pin(p);
      release(place.slot);
    }

    // ---- k and both norms
    uint32_t k[kAll][4];
    Scales scales[2];
    {
      float own[kGroups][4];
#pragma unroll
      for (int32_t i = 0; i < kColumns / 2; ++i) own[i / 4][i % 4] = p[i];
      float rank_squares[2] = {}, rank_shift[2] = {};
      const auto& coordinates = rest.coordinates;
      const auto column_of = [&](int32_t g) { return g * 8 + quarter * 2; };
#pragma unroll
      for (int32_t first = 0; first < kGroups; first += kLookupGroups) {
        BlockLookup lookups[kLookupGroups][2];
        float radii[kLookupGroups][2];
        map_radii<kLookupGroups>(in, coordinates, 0, first, column_of, own, lookups, radii, [] {});
#pragma unroll
        for (int32_t i = 0; i < kLookupGroups; ++i) {
          const int32_t g = first + i, column = column_of(g);
          const float2 target = load_pair(coordinates.scaled_target + column), cross = load_pair(coordinates.cross + column);
          const float2 shift = load_pair(coordinates.shift + column);
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) {
            const float a = own[g][2 * half], b = own[g][2 * half + 1], radius = radii[i][half];
            const Direction direction = direction_of(lookups[i][half], a, b);
            uint32_t& packed = k[g / 2][g % 2 * 2 + half];
            packed = pack<S>(fmaf(radius, direction.cos, fmaf(-scalar, a, target.x)), fmaf(radius, direction.sin, fmaf(-scalar, b, target.y)));
            const float2 kept = unpack<S>(packed);  // the norms are those of the row that is built
            rank_squares[half] = fmaf(kept.x, fmaf(2.f * scalar, a, cross.x) + kept.x, rank_squares[half]);
            rank_squares[half] = fmaf(kept.y, fmaf(2.f * scalar, b, cross.y) + kept.y, rank_squares[half]);
            rank_shift[half] = fmaf(kept.x, shift.x, fmaf(kept.y, shift.y, rank_shift[half]));
          }
        }
      }
      float sums[4];
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        sums[2 * half] = sum_over_row(fmaf(scalar * scalar, dots[half][0], fmaf(2.f * scalar, dots[half][1], rank_squares[half]))) + offset_squares;
        sums[2 * half + 1] = sum_over_row(fmaf(scalar, dots[half][2], rank_shift[half])) + offset_shift;
      }
      fast_scales(sums, shift_squares, shifted, scales);
    }

    // ---- w, scaled
    for (int32_t c = 0; c < columns / kChunkColumns; c += 2) {
      float w[64] = {};
      uint32_t y[2][2][2][4];  // of each chunk, piece and row
      RingPlace before = place;
      pin(w);
#pragma unroll
      for (int32_t first = 0; first < 2; ++first) {
        if (first == 1) {
          before = place;
          place.advance(stages);
        }
        wait_phase(full(place.slot), place.parity);
        products_begin();
        const uint64_t basis = wide_operand(stage(place.slot) + Layout::kRowsBytes);
#pragma unroll
        for (int32_t i = 0; i < kAll / 2; ++i) {
          rebuild<S>(w, k[first * (kAll / 2) + i], basis + operand_offset(i / 4 * 2 * Layout::kPieceBytes + i % 4 * 32));
        }
        products_commit();
#pragma unroll
        for (int32_t piece = 0; piece < 2; ++piece) {
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) load_piece(place.slot, half, piece, y[first][piece][half]);
        }
      }
      products_wait();
      pin(w);
#pragma unroll
      for (int32_t first = 0; first < 2; ++first) {
#pragma unroll
        for (int32_t piece = 0; piece < 2; ++piece) {
          float offset[8], shift[8];
          load_vector(vectors, c + first, piece, offset);
          load_vector(vectors + vector_bytes, c + first, piece, shift);
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) {
            const float factor = scales[half].inverse * scales[half].outer, shift_factor = scales[half].outer;
            uint32_t line[4];
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) {
              const float2 value = unpack<S>(y[first][piece][half][i]);
              const float* values = &w[32 * first + 16 * piece + 4 * i + 2 * half];
              const auto result = [&](float w, float y, float offset, float shift) {
                return fmaf(w + fmaf(scalar, y, offset), factor, shift * shift_factor);
              };
              line[i] = pack<S>(result(values[0], value.x, offset[2 * i], shift[2 * i]),
                                result(values[1], value.y, offset[2 * i + 1], shift[2 * i + 1]));
            }
            const int64_t row = first_row + half * 8;
            const int32_t column = (c + first) * kChunkColumns + piece * 32 + quarter * 8;
            store_line_inside(arguments.out + row * in.width + column, line, row < arguments.count && column < in.width, last_time);
          }
        }
        release(first == 0 ? before.slot : place.slot);
      }
      place.advance(stages);
    }
  }
  cluster_sync();  // no block leaves while another may still write to it, or tell it something
#endif
}

}  // namespace aniso::sm90
