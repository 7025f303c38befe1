// The refiner's input from source rows (METHOD section 4).
//
//   out = [sin theta0; cos theta0; log T(rho); v0]      v0 = W_out k + scale * y + offset, k of correct.cu with c^ = 0
//
// Shapes   y [N, D]; out [N, 3M + D]; constants as in correct.cu.
// Grid, shared memory as in correct.cu.
// Global   as in correct.cu; W_out k is kept in `out` or in the workspace. From memory: D storage values read and 3M + D
//          written per row.
// FLOP     2 D (R_in + R_out) per row, three times that on tensor cores (Split).
#include "aniso/elementary.h"
#include "tile_rows.cuh"

namespace aniso {
namespace {

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    encode_kernel(const DeviceOperands<T> in, const DeviceRows<S> y, const int32_t tile_rows, T* workspace, S* out) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank_out);
  const Weights<T, false> input_weight{in.input_weight, in.rank_in, in.width};
  const Weights<T, false> output_weight{in.output_weight, in.width, in.rank_out};
  const int32_t blocks = in.rank / 2;
  const int32_t columns = 3 * blocks + in.width;

  for_each_tile(y.count, tile_rows, [&](const Tile& at) {
    const int64_t first_row = at.first_row();
    const int32_t rows = at.rows;
    const TileRows<S> tile(y, first_row);
    S* result = result_row(out, first_row, columns);
    S* complement = result + 3 * blocks;
    const KeptRows<T> kept = kept_rows(complement, columns, workspace, tile_rows, in.width);
    project<Summing::kBySteps>(tile, rows, input_weight, staging, coefficients);
    for_each_block<true>(
        rows, blocks, [&](int32_t row, int32_t block) { return map_block(in, coefficients, row, block); },
        [&](int32_t row, int32_t block, const MappedBlock<T>& m) {
          S* polar = result + int64_t(row) * columns + block;
          polar[0] = narrow<S>(m.polar.sin);
          polar[blocks] = narrow<S>(m.polar.cos);
          polar[2 * blocks] = narrow<S>(log_of(m.mapped.radius));
          store_coefficients(in, m, coefficients, coefficients, row, block, T(0), T(0));
        });
    __syncthreads();
    rebuild(coefficients, rows, output_weight, staging, kept);
    store_rows(kept, InitialRow<S, T>{in, tile}, rows, in.width, complement, columns);
  });
}

}  // namespace

template <typename S, typename T>
cudaError_t launch_encode(const DeviceOperands<T>& operands, const DeviceRows<S>& y, S* out, Products products,
                          Workspace workspace, cudaStream_t stream) {
  if (!valid(operands) || y.count < 0) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  return with_engine<S>(products, [&](auto engine) {
    using E = decltype(engine);
    Plan plan;
    const cudaError_t error = plan_launch<E>(encode_kernel<S, E, T>, y.count, padded<E>(operands.rank_out),
                                             kept_bytes<S>(operands.width), workspace.bytes, &plan);
    if (error != cudaSuccess) return error;
    encode_kernel<S, E, T><<<plan.grid, kThreads, plan.shared_bytes, stream>>>(
        operands, y, plan.tile_rows, static_cast<T*>(workspace.data), out);
    return cudaGetLastError();
  });
}

#define ANISO_INSTANTIATE(S, T)                                                                                       \
  template cudaError_t launch_encode<S, T>(const DeviceOperands<T>&, const DeviceRows<S>&, S*, Products, Workspace, \
                                           cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
