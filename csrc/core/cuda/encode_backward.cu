// Gradient of the refiner's input (encode.cu) with respect to the source rows.
//
//   grad_k = W_out^T grad_v0      grad_p = polar_backward(grad of sin, cos, log) and what k has of p itself
//   grad_y = W_in^T grad_p + scale * grad_v0
//
// Shapes   grad [N, 3M + D]; y, grad_y [N, D]; constants as in correct.cu.
// Grid     as in correct.cu.
// Shared   p, 64 R_in sums, whose place grad_p takes; grad_k, 64 R_out sums; staging.
// Global   y is read once per 128 columns of R_in, grad once per 128 of R_out and once more; the weights stream from L2:
//          W_in twice and W_out once a tile. From memory: 3 (M + D) storage values per row.
// FLOP     2 D (2 R_in + R_out) per row, three times that on tensor cores (Split).
#include "tile_rows.cuh"

namespace aniso {
namespace {

template <typename T>
struct PolarGradient {
  MappedBlock<T> block;
  T sin, cos, log;
};

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    encode_backward_kernel(const DeviceOperands<T> in, const DeviceRows<S> grad, const DeviceRows<S> y,
                           const int32_t tile_rows, S* grad_y) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> projected = take_lines<E>(memory, tile_rows, in.rank_in);
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank_out);
  const Weights<T, false> input_weight{in.input_weight, in.rank_in, in.width};
  const Weights<T, true> gather{in.output_weight, in.rank_out, in.width};
  const Weights<T, true> spread{in.input_weight, in.width, in.rank_in};
  const int32_t blocks = in.rank / 2;

  for_each_tile(y.count, tile_rows, [&](const Tile& at) {
    const int64_t first_row = at.first_row();
    const int32_t rows = at.rows;
    const TileRows<S> polar(grad, first_row), complement(grad, first_row, 3 * blocks);
    S* result = result_row(grad_y, first_row, in.width);
    project(TileRows<S>(y, first_row), rows, input_weight, staging, projected);
    project(complement, rows, gather, staging, coefficients);
    for_each_block<true>(
        rows, blocks,
        [&](int32_t row, int32_t block) {
          return PolarGradient<T>{map_block(in, projected, row, block), polar(row, block), polar(row, blocks + block),
                                  polar(row, 2 * blocks + block)};
        },
        [&](int32_t row, int32_t block, const PolarGradient<T>& g) {
          T through_a, through_b;
          polar_backward(g.block.polar, g.block.mapped, g.sin, g.cos, g.log, &through_a, &through_b);
          store_projected_gradient(in, coefficients, projected, row, block, through_a, through_b);
        });
    __syncthreads();
    multiply_lines<E>(
        projected, rows, spread, staging,
        [&](int32_t row, int32_t column, T sum) {
          return sum + constant(in.scale + column * in.scale_stride) * complement(row, column);
        },
        [&](int32_t row, int32_t column, Pair<T> sums) { store_pair(result, in.width, row, column, in.width, sums); });
    __syncthreads();
  });
}

}  // namespace

template <typename S, typename T>
cudaError_t launch_encode_backward(const DeviceOperands<T>& operands, const DeviceRows<S>& grad,
                                   const DeviceRows<S>& y, S* grad_y, Products products, cudaStream_t stream) {
  if (!valid(operands) || !same_rows(grad, y)) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  return with_engine<S>(products, [&](auto engine) {
    using E = decltype(engine);
    Plan plan;
    const cudaError_t error = plan_launch<E>(encode_backward_kernel<S, E, T>, y.count,
                                             padded<E>(operands.rank_in) + padded<E>(operands.rank_out), 0, 0, &plan);
    if (error != cudaSuccess) return error;
    encode_backward_kernel<S, E, T>
        <<<plan.grid, kThreads, plan.shared_bytes, stream>>>(operands, grad, y, plan.tile_rows, grad_y);
    return cudaGetLastError();
  });
}

#define ANISO_INSTANTIATE(S, T)                                                                             \
  template cudaError_t launch_encode_backward<S, T>(const DeviceOperands<T>&, const DeviceRows<S>&,         \
                                                    const DeviceRows<S>&, S*, Products, cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
