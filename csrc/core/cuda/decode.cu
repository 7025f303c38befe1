// Bounded update of encoded rows, rebuilt, normalised and calibrated (METHOD section 4, D11).
//
//   c^ = turn(state, deltas)   step = a_v tanh(dv)   k = c^ - Q^T step (project)   w = Q k + v0 + step
//   e' = w/max(|w|, floor)     e = Norm(e' + shift)
//
// Shapes   state [N, 3M + D]; deltas [N, R + D]; out [N, D]; Q [D, R]. Any N, D and R.
// Grid     persistent: at most two blocks of 256 threads a processor, each with one tile of up to 64 rows after another.
// Shared   k, 64 R sums, in place of Q^T step; two buffers of 64 rows and 128 columns of a product's next part.
// Global   dv is read three times and v0 twice, mostly from L2 again; Q streams from L2 twice a tile. step, read once per
//          128 columns of R, and then Q k are kept in `out` or in the workspace, mostly in L2. From memory: 5M + 3 D storage values per row.
// FLOP     4 D R per row (2 D R without project), three times that on tensor cores (Split); 3 D tanh.
#include "tile_updates.cuh"

namespace aniso {
namespace {

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    decode_kernel(const DeviceUpdate<T> in, const DeviceRows<S> state, const DeviceRows<S> deltas,
                  const int32_t tile_rows, T* workspace, S* out) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank);
  for_each_tile(state.count, tile_rows, [&](const Tile& at) {
    const int64_t first_row = at.first_row();
    const int32_t rows = at.rows;
    const UpdateTile<S, T> tile(in, state, deltas, first_row);
    S* result = result_row(out, first_row, in.width);
    const KeptRows<T> kept = kept_rows(result, in.width, workspace, tile_rows, in.width);
    rebuild_update(in, tile, rows, staging, coefficients, kept);
    finish_rows(kept, tile, rows, in.width, in.shift, result);
  });
}

}  // namespace

template <typename S, typename T>
cudaError_t launch_decode(const DeviceUpdate<T>& update, const DeviceRows<S>& state, const DeviceRows<S>& deltas,
                          S* out, Products products, Workspace workspace, cudaStream_t stream) {
  if (!valid(update) || !same_rows(state, deltas)) return cudaErrorInvalidValue;
  if (state.count == 0) return cudaSuccess;
  return with_engine<S>(products, [&](auto engine) {
    using E = decltype(engine);
    Plan plan;
    const cudaError_t error = plan_launch<E>(decode_kernel<S, E, T>, state.count, padded<E>(update.rank),
                                             kept_bytes<S>(update.width), workspace.bytes, &plan);
    if (error != cudaSuccess) return error;
    decode_kernel<S, E, T><<<plan.grid, kThreads, plan.shared_bytes, stream>>>(
        update, state, deltas, plan.tile_rows, static_cast<T*>(workspace.data), out);
    return cudaGetLastError();
  });
}

#define ANISO_INSTANTIATE(S, T)                                                                                   \
  template cudaError_t launch_decode<S, T>(const DeviceUpdate<T>&, const DeviceRows<S>&, const DeviceRows<S>&, S*, \
                                           Products, Workspace, cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
