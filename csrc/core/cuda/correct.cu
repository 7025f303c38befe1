// Closed-form correction of source rows (METHOD section 4).
//
//   p = W_in y + bias             k = coefficients of the mapped blocks (store_coefficients)
//   w = W_out k + scale * y + offset      e' = w/max(|w|, floor)      e = Norm(e' + shift)
//
// Shapes   y, out [N, D]; W_in [R_in, D]; W_out [D, R_out]; segments [M, K + 1]; buckets [M, G]. Any N, D, R and K.
// Grid     persistent: at most two blocks of 256 threads a processor, each with one tile of up to 64 rows after another.
// Shared   k, 64 R_out sums, in place of p; two buffers of 64 rows and 128 columns of a product's next part.
// Global   y is read once per 128 columns of R_in and once more for w; W_in and W_out stream from L2 once a tile. w is
//          written once and read twice: in `out` or in the workspace, mostly in L2. From memory: 2 D storage values per row.
// FLOP     2 D (R_in + R_out) per row, three times that on tensor cores (Split).
#include "tile_rows.cuh"

namespace aniso {
namespace {

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    correct_kernel(const DeviceOperands<T> in, const DeviceRows<S> y, const int32_t tile_rows, T* workspace, S* out) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank_out);
  const Weights<T, false> input_weight{in.input_weight, in.rank_in, in.width};
  const Weights<T, false> output_weight{in.output_weight, in.width, in.rank_out};
  for_each_tile(y.count, tile_rows, [&](const Tile& at) {
    const int64_t first_row = at.first_row();
    const int32_t rows = at.rows;
    const TileRows<S> tile(y, first_row);
    S* result = result_row(out, first_row, in.width);
    const KeptRows<T> kept = kept_rows(result, in.width, workspace, tile_rows, in.width);
    project(tile, rows, input_weight, staging, coefficients);
    map_blocks(in, rows, coefficients, coefficients);
    rebuild(coefficients, rows, output_weight, staging, kept);
    finish_rows(kept, InitialRow<S, T>{in, tile}, rows, in.width, in.shift, result);
  });
}

}  // namespace

template <typename S>
cudaError_t rows_workspace(int64_t rows, int32_t width, int64_t* bytes) {
  int64_t blocks = 0, in_flight = 0;
  const cudaError_t error = rows_in_flight(rows, &blocks, &in_flight);
  *bytes = in_flight * kept_bytes<S>(width);
  return error;
}

template <typename S, typename T>
cudaError_t launch_correct(const DeviceOperands<T>& operands, const DeviceRows<S>& y, S* out, Products products,
                           Workspace workspace, cudaStream_t stream) {
  if (!valid(operands) || y.count < 0) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  return with_engine<S>(products, [&](auto engine) {
    using E = decltype(engine);
    Plan plan;
    const cudaError_t error = plan_launch<E>(correct_kernel<S, E, T>, y.count, padded<E>(operands.rank_out),
                                             kept_bytes<S>(operands.width), workspace.bytes, &plan);
    if (error != cudaSuccess) return error;
    correct_kernel<S, E, T><<<plan.grid, kThreads, plan.shared_bytes, stream>>>(
        operands, y, plan.tile_rows, static_cast<T*>(workspace.data), out);
    return cudaGetLastError();
  });
}

#define ANISO_INSTANTIATE(S, T)                                                                                        \
  template cudaError_t rows_workspace<S>(int64_t, int32_t, int64_t*);                                                  \
  template cudaError_t launch_correct<S, T>(const DeviceOperands<T>&, const DeviceRows<S>&, S*, Products, Workspace, \
                                            cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
