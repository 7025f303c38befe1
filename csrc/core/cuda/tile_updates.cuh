// What decode.cu and decode_backward.cu share: the bounded update of a tile up to Q k.
#pragma once

#include "aniso/turn.h"
#include "tile_rows.cuh"

namespace aniso {
namespace {

// The parts of a tile of states [sin; cos; log rho; v0] and deltas [dtheta; drho; dv].
template <typename S, typename T>
struct UpdateTile {
  const DeviceUpdate<T>& in;
  TileRows<S> state, deltas, complement, moves;

  __device__ __forceinline__ UpdateTile(const DeviceUpdate<T>& in, const DeviceRows<S>& state,
                                        const DeviceRows<S>& deltas, int64_t first_row)
      : in(in),
        state(state, first_row),
        deltas(deltas, first_row),
        complement(state, first_row, in.rank / 2 * 3),
        moves(deltas, first_row, in.rank) {}

  __device__ __forceinline__ Turn<T> turned(int32_t row, int32_t block) const {
    const int32_t blocks = in.rank / 2;
    return turn(state(row, block), state(row, blocks + block), state(row, 2 * blocks + block), deltas(row, block),
                deltas(row, blocks + block), in.a_theta, in.a_rho);
  }
  __device__ __forceinline__ T step(int32_t row, int32_t column) const { return in.a_v * tanh_of(moves(row, column)); }
  // w from Q k
  __device__ __forceinline__ T operator()(int32_t row, int32_t column, T rebuilt) const {
    return rebuilt + complement(row, column) + step(row, column);
  }
};

// kept = Q k, k = c^ - Q^T step (without the last term unless it is asked for).
template <typename E, typename S, typename T>
__device__ __forceinline__ void rebuild_update(const DeviceUpdate<T>& in, const UpdateTile<S, T>& tile, int32_t rows,
                                               Staging<E>& staging, const Lines<E>& coefficients,
                                               const KeptRows<T>& kept) {
  if (in.project) {
    const auto step = [&](int32_t row, int32_t column, T) { return tile.step(row, column); };
    store_rows(kept, step, rows, in.width, kept.data, kept.stride);
    project(kept, rows, Weights<T, true>{in.basis, in.rank, in.width}, staging, coefficients);
  }
  for_each_block<true>(
      rows, in.rank / 2, [&](int32_t row, int32_t block) { return tile.turned(row, block); },
      [&](int32_t row, int32_t block, const Turn<T>& t) {
        T a = t.radius * t.cos, b = t.radius * t.sin;
        if (in.project) {
          a -= coefficients.raw(row, 2 * block);
          b -= coefficients.raw(row, 2 * block + 1);
        }
        coefficients.put(row, 2 * block, a, b);
      });
  __syncthreads();
  rebuild(coefficients, rows, Weights<T, false>{in.basis, in.width, in.rank}, staging, kept);
}

}  // namespace
}  // namespace aniso
