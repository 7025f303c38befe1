// Gradient of the closed-form correction (correct.cu) with respect to the source rows.
//
//   grad_w = gradient at w from t = grad at e (row_scales.h)        grad_k = W_out^T grad_w
//   grad_p = map_backward(grad_k), and what k has of p itself       grad_y = W_in^T grad_p + scale * grad_w
//
// Shapes   grad, y, grad_y [N, D]; constants as in correct.cu.
// Grid     as in correct.cu.
// Shared   p, 64 R_in sums, whose place grad_p takes; k, 64 R_out sums, whose place grad_k takes; staging.
// Global   y is read once per 128 columns of R_in and once more for w; grad twice; each weight streams from L2 twice a tile.
//          w and then grad_w are kept in `grad_y` or in the workspace, mostly in L2. From memory: 3 D storage values per row.
// FLOP     4 D (R_in + R_out) per row, three times that on tensor cores (Split).
#include "tile_rows.cuh"

namespace aniso {
namespace {

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    correct_backward_kernel(const DeviceOperands<T> in, const DeviceRows<S> grad, const DeviceRows<S> y,
                            const int32_t tile_rows, T* workspace, S* grad_y) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> projected = take_lines<E>(memory, tile_rows, in.rank_in);
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank_out);
  const Weights<T, false> input_weight{in.input_weight, in.rank_in, in.width};
  const Weights<T, false> output_weight{in.output_weight, in.width, in.rank_out};
  const Weights<T, true> gather{in.output_weight, in.rank_out, in.width};
  const Weights<T, true> spread{in.input_weight, in.width, in.rank_in};

  for_each_tile(y.count, tile_rows, [&](const Tile& at) {
    const int32_t rows = at.rows;
    const auto kept_in = [&](int64_t row) {
      return kept_rows(result_row(grad_y, row, in.width), in.width, workspace, tile_rows, in.width);
    };
    {
      const TileRows<S> tile(y, at.first_row());
      const KeptRows<T> kept = kept_in(at.first_row());
      project(tile, rows, input_weight, staging, projected);
      map_blocks(in, rows, projected, coefficients);
      rebuild(coefficients, rows, output_weight, staging, kept);
      finish_backward(kept, InitialRow<S, T>{in, tile}, TileRows<S>(grad, at.first_row()), rows, in.width, in.shift);
    }
    project(kept_in(at.first_row()), rows, gather, staging, coefficients);
    for_each_block<false>(
        rows, in.rank / 2, [&](int32_t row, int32_t block) { return map_block(in, projected, row, block); },
        [&](int32_t row, int32_t block, const MappedBlock<T>& m) {
          T through_a, through_b;
          map_backward(m.polar, m.mapped, coefficients.raw(row, 2 * block), coefficients.raw(row, 2 * block + 1),
                       &through_a, &through_b);
          store_projected_gradient(in, coefficients, projected, row, block, through_a, through_b);
        });
    __syncthreads();
    const KeptRows<T> kept = kept_in(at.first_row());
    S* result = result_row(grad_y, at.first_row(), in.width);
    multiply_lines<E>(
        projected, rows, spread, staging,
        [&](int32_t row, int32_t column, T sum) {
          return sum + constant(in.scale + column * in.scale_stride) * kept(row, column);
        },
        [&](int32_t row, int32_t column, Pair<T> sums) { store_pair(result, in.width, row, column, in.width, sums); });
    __syncthreads();
  });
}

}  // namespace

template <typename S, typename T>
cudaError_t launch_correct_backward(const DeviceOperands<T>& operands, const DeviceRows<S>& grad,
                                    const DeviceRows<S>& y, S* grad_y, Products products, Workspace workspace,
                                    cudaStream_t stream) {
  if (!valid(operands) || !same_rows(grad, y)) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  return with_engine<S>(products, [&](auto engine) {
    using E = decltype(engine);
    Plan plan;
    const cudaError_t error =
        plan_launch<E>(correct_backward_kernel<S, E, T>, y.count, padded<E>(operands.rank_in) + padded<E>(operands.rank_out),
                       kept_bytes<S>(operands.width), workspace.bytes, &plan);
    if (error != cudaSuccess) return error;
    correct_backward_kernel<S, E, T><<<plan.grid, kThreads, plan.shared_bytes, stream>>>(
        operands, grad, y, plan.tile_rows, static_cast<T*>(workspace.data), grad_y);
    return cudaGetLastError();
  });
}

#define ANISO_INSTANTIATE(S, T)                                                                                   \
  template cudaError_t launch_correct_backward<S, T>(const DeviceOperands<T>&, const DeviceRows<S>&,              \
                                                     const DeviceRows<S>&, S*, Products, Workspace, cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
