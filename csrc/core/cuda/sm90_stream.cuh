// The closed form on Hopper where the basis is too large to stay in shared memory (METHOD section 4): ranks up to 256, any width.
//
//   p = Q^T y        c_t = p + bias        k = T(rho) (cos, sin) - s c_t        w = Q k + s y + offset
//   e' = w/|w|       e = Norm(e' + shift)                       s: a number
//   |w|^2 = k.k + 2 k.(s p + Q^T offset) + |s y + offset|^2     w.shift = k.Q^T shift + (s y + offset).shift     as Q^T Q = I
//
// Shapes   y, out [N, D]; Q [D, kColumns], R <= kColumns; cells [M, G + 1].
// Grid     pairs of blocks, as many as fit the device; a block takes tiles of 128 rows, its two warpgroups 64 each.
// A tile   1 for every chunk of 64 columns the copy engine brings y and Q, and p grows by their product; 2 the cells of the radius maps
//          come the same way, and k and both norms follow, as a thread has every fourth block of the rank of its rows; 3 for every chunk
//          y, mostly from L2, and Q come once more: w, scaled, goes out. Nothing of the rows is kept in between, and nothing is exchanged
//          between warps.
// Shared   a ring of stages, each of a chunk of y and one of Q, or of the cells of some blocks of the rank, that a warp of its own fills as
//          the others release them. The blocks of a pair fetch half of Q and of the cells each and send it to both, so that L2 gives each
//          once for 256 rows.
// Registers  p in fp32, kColumns / 2 a thread; then k, packed, and two chunks of w. Nothing is rounded but k and the result.
// Global   2 D storage values, and D more from L2; 8 R D / 256 bytes of Q and 4 M (G + 1) / 256 of the radius maps a row from L2.
// FLOP     4 D R for each row.
#pragma once

#include "sm90_stream_ring.cuh"

namespace aniso::sm90 {

// A block of a thread, its radius on the way from p to k. `inverse` times the coordinates is the direction, at the origin too, for which
// `a` is moved off it to where that is (1, 0).
struct StreamedBlock {
  float inverse, rho;
  float place;    // in its cell, then the mapped radius
  uint32_t cell;  // where it is among those of the block, in bytes, then the cell

  __device__ __forceinline__ StreamedBlock() {}
  __device__ __forceinline__ StreamedBlock(float cell_scale, float cell_count, float& a, float b) {
    constexpr float kLeast = 1e-36f, kIntegers = 8388608.f;  // from there on to twice that a number is its integer's bits
    const float squared = fmaf(a, a, fmaf(b, b, kLeast));
    if (squared < 2.f * kLeast) a = 1e-18f;
    inverse = inverse_root(squared);
    rho = square_root(squared + float(kRadiusEps));
    const float position = fminf(rho * cell_scale, cell_count), floored = __fadd_rd(position, kIntegers);
    place = position - (floored - kIntegers);
    cell = (__float_as_uint(floored) - __float_as_uint(kIntegers)) * uint32_t(sizeof(uint32_t));
  }
};

// What one of the warps that multiply does with a tile. What it holds of a product is, of two rows eight apart (`half`), eight neighbours
// in each half (`piece`) of a chunk, and every fourth block of the rank.
template <typename S, int kColumns>
struct StreamTeam {
  using Layout = StreamShared<kColumns>;
  using Constants = Coordinates<kColumns>;
  static constexpr int32_t kGroups = Layout::kGroups, kAll = kColumns / 16;
  static constexpr int32_t kTogether = 8;  // groups of the rank

  const StreamArguments<S>& arguments;
  const Constants& coordinates;
  Ring<kColumns> ring;
  uint32_t vectors, vector_bytes;  // of offset, then shift, in shared memory
  int32_t warpgroup, lane, quarter, first_of_warp;
  float scalar, offset_squares, shift_squares, offset_shift;

  __device__ __forceinline__ StreamTeam(const StreamArguments<S>& arguments, const Constants& coordinates, const Ring<kColumns>& ring,
                                        uint32_t vectors, int32_t warp)
      : arguments(arguments),
        coordinates(coordinates),
        ring(ring),
        vectors(vectors),
        vector_bytes(arguments.columns * 4),
        warpgroup(warp / kWarps),
        lane(threadIdx.x % 32),
        quarter(lane % 4),
        first_of_warp(warp % kWarps * 16 + lane / 4),
        scalar(arguments.in.scale[0]),
        offset_squares(dot_of(arguments.in.offset, arguments.in.offset, arguments.in.width, lane)),
        shift_squares(dot_of(arguments.in.shift, arguments.in.shift, arguments.in.width, lane)),
        offset_shift(dot_of(arguments.in.offset, arguments.in.shift, arguments.in.width, lane)) {}

  __device__ __forceinline__ void load_rows(int32_t half, int32_t piece, uint32_t (&pairs)[4]) const {
    const int32_t row = first_of_warp + half * 8;
    load_shared(ring.rows() + warpgroup * kTileChunkBytes + row * 128 + (((piece * 4 + quarter) ^ (row & 7)) * 16), pairs);
  }
  __device__ __forceinline__ void load_vectors(int32_t chunk, int32_t piece, float (&offset)[8], float (&shift)[8]) const {
    const uint32_t from = vectors + (chunk * kChunkColumns + piece * 32 + quarter * 8) * 4;
    load_shared(from, offset);
    load_shared(from + vector_bytes, shift);
  }

  // p, and y.y, y.offset and y.shift of both rows, of which each of four threads has its part.
  __device__ __forceinline__ void project_rows(float (&p)[kColumns / 2], float (&dots)[2][3]) {
#pragma unroll
    for (int32_t i = 0; i < kColumns / 2; ++i) p[i] = 0.f;
    const int32_t chunks = (arguments.in.width + kChunkColumns - 1) / kChunkColumns;
    for (int32_t c = 0; c < chunks; ++c, ring.advance()) {
      ring.wait_until_full();
      pin(p);
      products_begin();
      const uint64_t rows = wide_operand(ring.rows() + warpgroup * kTileChunkBytes);
      const uint64_t basis = rank_operand(ring.basis(), Layout::kPieceBytes);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        project<S>(p, rows + operand_offset(i * 32), basis + operand_offset(i * 16 * Layout::kPieceRowBytes));
      }
      products_commit();
      add_dots(c, dots);
      products_wait();
      pin(p);
      pin(dots[0]);
      pin(dots[1]);
      ring.release(ring.slot, lane);
    }
  }

  __device__ __forceinline__ void add_dots(int32_t chunk, float (&dots)[2][3]) const {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      float offset[8], shift[8];
      load_vectors(chunk, piece, offset, shift);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        uint32_t y[4];
        load_rows(half, piece, y);
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
  }

  // k in the place of p, and both norms.
  __device__ __forceinline__ void map_rows(float (&p)[kColumns / 2], const float (&dots)[2][3], uint32_t (&k)[kAll][4],
                                           Scales (&scales)[2]) {
    float rank_squares[2] = {}, rank_shift[2] = {};
#pragma unroll
    for (int32_t first = 0; first < kGroups; first += kTogether) {
      StreamedBlock blocks[kTogether][2];
      find_cells(first, p, blocks);
      read_cells(first, blocks);
      map_radii(first, blocks);
#pragma unroll
      for (int32_t i = 0; i < kTogether; ++i) {
        const int32_t g = first + i, column = g * 8 + quarter * 2;
        const float2 target = load_pair(coordinates.scaled_target + column), cross = load_pair(coordinates.cross + column);
        const float2 shift = load_pair(coordinates.shift + column);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const float a = p[4 * g + 2 * half], b = p[4 * g + 2 * half + 1];
          const float factor = fmaf(blocks[i][half].place, blocks[i][half].inverse, -scalar);
          uint32_t& packed = k[g / 2][g % 2 * 2 + half];
          packed = pack<S>(fmaf(factor, a, target.x), fmaf(factor, b, target.y));
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
      const float squares = fmaf(scalar * scalar, dots[half][0], fmaf(2.f * scalar, dots[half][1], rank_squares[half]));
      sums[2 * half] = sum_over_row(squares) + offset_squares;
      sums[2 * half + 1] = sum_over_row(fmaf(scalar, dots[half][2], rank_shift[half])) + offset_shift;
    }
    fast_scales(sums, shift_squares, arguments.in.shift != nullptr, scales);
  }

  // Adds the bias to the coordinates of some groups, and says where their cells are.
  __device__ __forceinline__ void find_cells(int32_t first, float (&p)[kColumns / 2], StreamedBlock (&blocks)[kTogether][2]) const {
    const float cell_count = float(arguments.in.cell_count);
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      const int32_t g = first + i, column = g * 8 + quarter * 2;
      const float2 turned_bias = load_pair(coordinates.turned_bias + column);
      const float cell_scale = coordinates.cell_scale[column / 2];
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        float &a = p[4 * g + 2 * half], &b = p[4 * g + 2 * half + 1];
        a += turned_bias.x;
        b += turned_bias.y;
        blocks[i][half] = StreamedBlock(cell_scale, cell_count, a, b);
      }
    }
  }

  // From the stages, one after another. Cells of earlier groups in a stage have been used by the vote of map_radii.
  __device__ __forceinline__ void read_cells(int32_t first, StreamedBlock (&blocks)[kTogether][2]) {
    const int32_t run = arguments.run, of_block = (arguments.in.cell_count + 1) * int32_t(sizeof(uint32_t));
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      const int32_t in_run = (first + i) & (run - 1);
      if (in_run == 0) ring.wait_until_full();
      const uint32_t cells = ring.cells() + (in_run * 4 + quarter) * of_block;
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) blocks[i][half].cell = load_word(cells + blocks[i][half].cell);
      if (in_run == run - 1) {
        uint32_t read = 0;
#pragma unroll
        for (int32_t j = 0; j <= i; ++j) read |= blocks[j][0].cell | blocks[j][1].cell;
        ring.release_after(read, ring.slot, lane);
        ring.advance();
      }
    }
  }

  // A cell that is too coarse is searched.
  __device__ __forceinline__ void map_radii(int32_t first, StreamedBlock (&blocks)[kTogether][2]) const {
    bool coarse = false;
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      const float2 map = load_pair(coordinates.map + (first + i) * 8 + quarter * 2);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        StreamedBlock& block = blocks[i][half];
        const float2 cell = unpack<Float16>(block.cell);
        coarse = coarse || isnan(cell.x);
        block.place = fmaf(block.rho, map.x, map.y * fmaf(block.place, cell.y, cell.x));
      }
    }
    if (!__any_sync(0xffffffffu, coarse)) return;
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        StreamedBlock& block = blocks[i][half];
        if (isnan(block.place)) block.place = search_map(arguments.in, (first + i) * 4 + quarter, block.rho).radius;
      }
    }
  }

  // w, scaled, two chunks at a time. Stages are released before the rows are stored, as y is in registers by then.
  __device__ __forceinline__ void build_rows(const uint32_t (&k)[kAll][4], const Scales (&scales)[2], int64_t first_row, uint64_t policy) {
    for (int32_t c = 0; c < arguments.columns / kChunkColumns; c += 2) {
      float w[64] = {};
      uint32_t y[2][2][2][4];  // of each chunk, piece and row
      const int32_t slot = ring.slot;
      pin(w);
#pragma unroll
      for (int32_t second = 0; second < 2; ++second) {
        if (second == 1) ring.advance();
        ring.wait_until_full();
        products_begin();
        const uint64_t basis = wide_operand(ring.basis());
#pragma unroll
        for (int32_t i = 0; i < kAll / 2; ++i) {
          rebuild<S>(w, k[second * (kAll / 2) + i], basis + operand_offset(i / 4 * 2 * Layout::kPieceBytes + i % 4 * 32));
        }
        products_commit();
#pragma unroll
        for (int32_t piece = 0; piece < 2; ++piece) {
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) load_rows(half, piece, y[second][piece][half]);
        }
      }
      products_wait(1);
      ring.release_after(joined(y[0]), slot, lane);
      products_wait();
      ring.release_after(joined(y[1]), ring.slot, lane);
      ring.advance();
      pin(w);
      store_rows(c, scales, w, y, first_row, policy);
    }
  }

  __device__ __forceinline__ static uint32_t joined(const uint32_t (&y)[2][2][4]) {
    uint32_t all = 0;
#pragma unroll
    for (int32_t i = 0; i < 16; ++i) all |= y[i / 8][i / 4 % 2][i % 4];
    return all;
  }

  __device__ __forceinline__ void store_rows(int32_t c, const Scales (&scales)[2], const float (&w)[64], const uint32_t (&y)[2][2][2][4],
                                             int64_t first_row, uint64_t policy) const {
    const int32_t width = arguments.in.width;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t column = c * kChunkColumns + i * 32 + quarter * 8;
      float offset[8], shift[8];
      load_vectors(c + i / 2, i % 2, offset, shift);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        const float factor = scales[half].inverse * scales[half].outer, shift_factor = scales[half].outer;
        const auto result = [&](float w, float y, float offset, float shift) {
          return fmaf(w + fmaf(scalar, y, offset), factor, shift * shift_factor);
        };
        uint32_t line[4];
#pragma unroll
        for (int32_t j = 0; j < 4; ++j) {
          const float2 value = unpack<S>(y[i / 2][i % 2][half][j]);
          const float* sums = &w[16 * i + 4 * j + 2 * half];
          line[j] = pack<S>(result(sums[0], value.x, offset[2 * j], shift[2 * j]),
                            result(sums[1], value.y, offset[2 * j + 1], shift[2 * j + 1]));
        }
        const int64_t row = first_row + half * 8;
        store_line_inside(arguments.out + row * width + column, line, row < arguments.count && column < width, policy);
      }
    }
  }

  __device__ __forceinline__ void correct(int64_t first_row, uint64_t policy) {
    float dots[2][3] = {};
    uint32_t k[kAll][4];
    Scales scales[2];
    {
      float p[kColumns / 2];
      project_rows(p, dots);
      map_rows(p, dots, k, scales);
    }
    build_rows(k, scales, first_row, policy);
  }
};

template <typename S, int kColumns>
__global__ void __launch_bounds__(StreamShared<kColumns>::kThreads, 1)
    sm90_stream_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                       const __grid_constant__ CUtensorMap shuffled_map, const __grid_constant__ CUtensorMap cells_map,
                       const __grid_constant__ StreamArguments<S> arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = StreamShared<kColumns>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<S>& in = arguments.in;
  auto& rest = *reinterpret_cast<typename Layout::Rest*>(shared_memory + arguments.stages * Layout::kStageBytes);
  const uint32_t vectors = shared_address(&rest + 1);
  const int32_t warp = __shfl_sync(0xffffffffu, int32_t(threadIdx.x) / 32, 0), block = int32_t(cluster_rank());
  const Ring<kColumns> ring(shared_memory, rest, arguments.stages);

  if (threadIdx.x == 0) ring.begin();
  for (int32_t j = threadIdx.x; j < arguments.columns; j += blockDim.x) {
    store_shared(vectors + j * 4, j < in.width ? in.offset[j] : 0.f);
    store_shared(vectors + (arguments.columns + j) * 4, j < in.width && in.shift != nullptr ? in.shift[j] : 0.f);
  }
  fill<kColumns>(rest.coordinates, in, 0);
  cluster_sync();

  const int64_t tiles = (arguments.count + kStreamRows - 1) / kStreamRows, pairs = (tiles + kStreamCluster - 1) / kStreamCluster;
  if (warp >= kStreamGroups * kWarps) {
    give_registers<40>();  // to the warps that multiply
    if (threadIdx.x == kStreamGroups * kWarpgroupThreads) {
      StreamSource<S, kColumns>{rows_map, basis_map, shuffled_map, cells_map, arguments, ring, block}.fill(pairs);
    }
    __syncwarp();
  } else {
    take_registers<232>();
    StreamTeam<S, kColumns> team(arguments, rest.coordinates, ring, vectors, warp);
    const uint64_t last_time = evicted_first();
    for (int64_t pair = cluster_index(); pair < pairs; pair += cluster_count()) {
      team.correct(((pair * kStreamCluster + block) * kStreamGroups + team.warpgroup) * kTileRows + team.first_of_warp, last_time);
    }
  }
  cluster_sync();  // no block leaves while another may still write to it, or tell it something
#endif
}

}  // namespace aniso::sm90
