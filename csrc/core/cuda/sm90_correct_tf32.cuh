// The closed form on Hopper for float32 rows whose products may round to TF32 (METHOD section 4), complement with a number S.
//
//   p = Q^T y        c_t = p + bias        k = T(rho) (cos, sin) - S c_t        w = Q k + S y + offset        e = Norm(w/|w| + shift)
//
// TF32 keeps as many bits of a number as fp16 does. So both products are fp16: Q has half the size, and one copy serves both, as wgmma
// reads a 16-bit operand along either dimension. What is added outside of the products stays fp32.
//
// Shapes   y, out [N, D]; Q [D, R], R <= 128, D <= 1280; cells [M, G + 1].
// Grid     as in sm90_correct.cuh.
// Order    Columns of Q are shuffled in groups of 16: of a step of 16 columns a thread has four numbers of each of its two rows, 16
//          neighbouring bytes of either.
// A tile   does not fit: half of it does, in boxes of 32 columns. 1 box by box into registers, which multiply from there; two that have been
//          read make room for two more, at last for those of the next tile; 2 partial p; 3 to 7 as in sm90_correct.cuh. Coefficients come
//          where the last two boxes were, and these places are filled again once the coefficients have been read.
// Shared   sm90_team.cuh, the constants of the coordinates, a barrier for each place of a box, and two numbers.
// Registers  y, then w, in fp32: 32 kChunks a thread, beside 64 sums of the projection. Nothing is rounded but the factors of products.
// Global   2 D words, and 4 bytes of the radius map for each of M blocks (from L2). Between the blocks of a cluster of C go
//          (C - 1) R (4 + 2) bytes for each row.
// FLOP     4 D R for each row.
#pragma once

#include "sm90_correct.cuh"

namespace aniso::sm90 {

struct Tf32Arguments {
  Sm90Operands<Float16> in;
  int64_t count;
  float* out;  // [N, D]
};

constexpr int32_t kBoxColumns = 32;  // of float32 rows: as many bytes as a chunk of half-precision ones

template <int kCluster, int kChunks>
struct Tf32Team : CorrectTeam<Float16, kCluster, kChunks, Form::kScalar, 2> {
  using Base = CorrectTeam<Float16, kCluster, kChunks, Form::kScalar, 2>;
  using Base::count, Base::exchange, Base::first_column, Base::first_of_warp, Base::leader, Base::quarter, Base::row, Base::shared,
      Base::stride, Base::tile, Base::tiles, Base::warpgroup, Base::width;
  static constexpr int32_t kBoxes = 2 * kChunks, kSlots = kChunks;  // of a tile, and in shared memory: a slot holds two boxes of a tile
  static constexpr int32_t kFirstCoefficientSlot = kSlots - 2;
  static constexpr uint32_t kFilled = Base::kBytes;  // a barrier for each slot
  static constexpr uint32_t kNumbers = kFilled + Base::kWarpgroups * kSlots * uint32_t(sizeof(uint64_t));
  static constexpr uint32_t kBytes = kNumbers + 2 * uint32_t(sizeof(float));
  static_assert((kCluster - 1) * Base::Shares::kOwnSteps <= 4 * (kSlots - kFirstCoefficientSlot), "coefficients overflow their slots");
  static_assert(kFilled % sizeof(uint64_t) == 0 && kBytes <= 232448, "a block has 227 KB of shared memory");

  __device__ __forceinline__ Tf32Team(unsigned char* shared_memory, int32_t width, int32_t rank, int64_t count)
      : Base(shared_memory, width, rank, count) {
    exchange.tile += kFirstCoefficientSlot * kTileChunkBytes;  // where coefficients come
  }

  __device__ __forceinline__ uint32_t slot(int32_t which) const {
    return exchange.tile + uint32_t(which - kFirstCoefficientSlot) * kTileChunkBytes;
  }
  __device__ __forceinline__ uint32_t filled(int32_t which) const {
    return shared + kFilled + (warpgroup * kSlots + which) * uint32_t(sizeof(uint64_t));
  }

  // Two numbers that are needed once a tile: in registers they would push out rows.
  __device__ __forceinline__ void keep_numbers(float scalar, float shift_squares) const {
    if (threadIdx.x != 0) return;
    store_shared(shared + kNumbers, scalar);
    store_shared(shared + kNumbers + uint32_t(sizeof(float)), shift_squares);
  }
  __device__ __forceinline__ float scalar() const { return load_number(shared + kNumbers); }
  __device__ __forceinline__ float shift_squares() const { return load_number(shared + kNumbers + uint32_t(sizeof(float))); }

  // A box into its slot; by the leader.
  __device__ __forceinline__ void load_box_of(const CUtensorMap& rows_map, int64_t of_tile, int32_t box) const {
    const int32_t which = box % kSlots;
    arrive_expecting(filled(which), kTileChunkBytes);
    load_box(slot(which), rows_map, first_column + box * kBoxColumns, int32_t(of_tile * kTileRows), filled(which));
  }

  __device__ __forceinline__ void begin(const CUtensorMap& basis_map, const CUtensorMap& rows_map) const {
    this->begin_basis(basis_map);
    if (!leader) return;
    for (int32_t which = 0; which < kSlots; ++which) barrier_init(filled(which), 1);
    barrier_init_fence();
    for (int32_t box = 0; box < kSlots && tile < tiles; ++box) load_box_of(rows_map, tile, box);
  }

  // What follows in the slots of a chunk that every thread has read.
  __device__ __forceinline__ void load_after_reading(const CUtensorMap& rows_map, int32_t c) const {
    reads_before_copy_fence();
    warpgroup_sync(warpgroup);
    if (!leader) return;
#pragma unroll
    for (int32_t box = 2 * c; box < 2 * c + 2; ++box) {
      if (box < kSlots) {
        load_box_of(rows_map, tile, box + kSlots);
      } else if (tile + stride < tiles) {
        load_box_of(rows_map, tile + stride, box - kSlots);
      }
    }
  }

  // A box into registers: y as the sums of a product have it, and as operands of one.
  __device__ __forceinline__ void take_box(int32_t box, float* y, uint32_t (&operands)[8]) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const int32_t row = first_of_warp + half * 8;
#pragma unroll
      for (int32_t step = 0; step < 2; ++step) {
        const float4 four = load_shared(slot(box % kSlots) + row * 128 + (((step * 4 + quarter) ^ (row & 7)) * 16));
        float* values = y + place(half, step);
        values[0] = four.x, values[1] = four.y, values[4] = four.z, values[5] = four.w;
        operands[4 * step + half] = pack<Float16>(four.x, four.y);
        operands[4 * step + half + 2] = pack<Float16>(four.z, four.w);
      }
    }
  }

  // Where four neighbours, of a step of 16 columns, are among the sums of a product: two there, two 4 further on.
  static __device__ __forceinline__ constexpr int32_t place(int32_t half, int32_t step) { return step * 8 + half * 2; }

  // The tile into registers, and its projection to the blocks, of which this one's share comes into `own`.
  __device__ __forceinline__ void project_and_send(const CUtensorMap& rows_map, float (&y)[kChunks][32],
                                                   float (&own)[Base::kOwnGroups][4], uint32_t parity) const {
    float part[64] = {};
    uint32_t operands[2][8];
#pragma unroll
    for (int32_t box = 0; box < kBoxes; ++box) {
      uint32_t(&rows)[8] = operands[box % 2];
      wait_phase(filled(box % kSlots), box / kSlots);
      if (box >= 2) {  // the operands are free, at last all of them
        products_wait(box + 1 < kBoxes ? 1 : 0);
        pin(rows);
      }
      take_box(box, &y[box / 2][box % 2 * 16], rows);
      pin(rows);
      // The last chunk makes room for coefficients.
      if (box % 2 == 1 && box + 1 < kBoxes) load_after_reading(rows_map, box / 2);
      products_begin();
#pragma unroll
      for (int32_t step = 0; step < 2; ++step) {
        project<Float16>(part, &rows[4 * step], this->basis + operand_offset((box * 2 + step) * 16 * kPanelRowBytes));
      }
      products_commit();
    }
    if (!this->is_first()) wait_phase(exchange.free(), parity ^ 1);
    products_wait();
    pin(part);
    pin(operands[0]);
    pin(operands[1]);
    exchange.send_parts(part, own);
  }

  // body(half, place among the sums of chunk c, column, four neighbours of a vector), for all columns of this thread.
  template <typename Body>
  __device__ __forceinline__ void for_each_place(Vector which, int32_t c, const Body& body) const {
#pragma unroll
    for (int32_t step = 0; step < 4; ++step) {
      const int32_t column = c * kChunkColumns + step * 16 + quarter * 4;
      const float4 vector = load_shared(this->vector_place(which) + column * uint32_t(sizeof(float)));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) body(half, place(half, step), first_column + column, vector);
    }
  }

  // S y + offset in the place of y.
  __device__ __forceinline__ void begin_rows(float (&w)[32], int32_t c) const {
    const float scalar = this->scalar();
    for_each_place(kOffset, c, [&](int32_t, int32_t at, int32_t, const float4& offset) {
      w[at] = fmaf(scalar, w[at], offset.x);
      w[at + 1] = fmaf(scalar, w[at + 1], offset.y);
      w[at + 4] = fmaf(scalar, w[at + 4], offset.z);
      w[at + 5] = fmaf(scalar, w[at + 5], offset.w);
    });
  }

  // |w|^2 and w.shift of both rows, over the columns of a chunk.
  __device__ __forceinline__ void add_squares(const float (&w)[32], int32_t c, float (&sums)[4]) const {
    for_each_place(kShift, c, [&](int32_t half, int32_t at, int32_t, const float4& shift) {
      float &squares = sums[2 * half], &dot_shift = sums[2 * half + 1];
#pragma unroll
      for (const int32_t i : {0, 1, 4, 5}) squares = fmaf(w[at + i], w[at + i], squares);
      dot_shift = fmaf(w[at], shift.x, fmaf(w[at + 1], shift.y, dot_shift));
      dot_shift = fmaf(w[at + 4], shift.z, fmaf(w[at + 5], shift.w, dot_shift));
    });
  }

  // A chunk of e = Norm(w/|w| + shift) into rows [N, D].
  __device__ __forceinline__ void store_unit_rows(const float (&w)[32], int32_t c, const Scales (&scales)[2], float* out) const {
    for_each_place(kShift, c, [&](int32_t half, int32_t at, int32_t column, const float4& shift) {
      const float factor = scales[half].inverse * scales[half].outer, shift_factor = scales[half].outer;
      const auto unit = [&](float value, float shift) { return __float_as_uint(fmaf(value, factor, shift * shift_factor)); };
      const uint32_t four[4] = {unit(w[at], shift.x), unit(w[at + 1], shift.y), unit(w[at + 4], shift.z), unit(w[at + 5], shift.w)};
      store_line_inside(out + row(half) * width + column, four, column < width && row(half) < count);
    });
  }
};

template <int kCluster, int kChunks>
__global__ void __launch_bounds__(Tf32Team<kCluster, kChunks>::kThreads, 1)
    sm90_correct_tf32_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap basis_map,
                             const __grid_constant__ Tf32Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Mates = Tf32Team<kCluster, kChunks>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Sm90Operands<Float16>& in = arguments.in;
  Mates team(shared_memory, in.width, in.rank, arguments.count);
  const auto& exchange = team.exchange;
  auto& coordinates = *reinterpret_cast<CoordinateVectors<kCluster>*>(shared_memory + Mates::Layout::kOther);
  team.begin(basis_map, rows_map);
  team.keep_vector(kShift, in.shift);
  team.keep_vector(kOffset, in.offset);
  fill(coordinates, in, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns);
  team.keep_numbers(in.scale[0], dot_of(in.shift, in.shift, in.width, team.lane));
  team.end_of_beginning();

  uint32_t parity = 0;
  for (; team.tile < team.tiles; team.tile += team.stride, parity ^= 1) {
    team.forget_addresses();
    if (team.leader) {
      exchange.expect_parts();
      exchange.expect_coefficients();
      exchange.expect_sums(4);
    }

    // ---- p from this block's columns
    float w[kChunks][32];  // y at first
    float own[Mates::kOwnGroups][4];
    team.project_and_send(rows_map, w, own, parity);

    // ---- the share of the rank that this block maps
    team.forget_addresses();
    wait_phase(exchange.projected(), parity);
    exchange.add_parts(own);
    uint32_t own_k[1][Mates::Shares::kOwnSteps][4];
    team.map_share(in, coordinates, team.scalar(), own, own_k, nullptr);
    exchange.send_coefficients(own_k[0]);

    // ---- w
    team.forget_addresses();
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.begin_rows(w[c], c);
    wait_phase(exchange.mapped(), parity);
    float sums[4] = {};
    const auto load_next = [&] { team.load_after_reading(rows_map, kChunks - 1); };  // the coefficients lay there
    team.template rebuild_rows<kChunks>(w, own_k[0], 0, load_next, [&](int32_t c) { team.add_squares(w[c], c, sums); });

    // ---- out
    exchange.send_sums(sums);
    exchange.receive_sums(sums, parity);
    Scales scales[2];
    fast_scales(sums, team.shift_squares(), in.shift != nullptr, scales);
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) team.store_unit_rows(w[c], c, scales, arguments.out);
    exchange.warp_is_done();
  }
  cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace aniso::sm90
