// Column sums of e' = w/max(|w|, floor) over all rows, the first pass of a corpus calibration; w as in correct.cu.
//
//   sums [D] = sum_i e'_i, in fp64
//
// Grid     as in correct.cu, then one thread a column.
// Shared   as in correct.cu; the 64 factors 1/max(|w|, floor) in the staging buffers.
// Global   as in correct.cu, but nothing is written for a row: w is kept in the workspace of its block, in L2. Every block
//          adds its tiles up in order in D doubles of its own, and the second kernel adds the blocks up in order: no
//          atomics, so the sums are the same bit for bit on every run on a device. From memory: D storage values per row.
// FLOP     2 D (R_in + R_out) + 4 D per row, D of them fp64 additions.
#include "tile_rows.cuh"

namespace aniso {
namespace {

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    correct_sums_kernel(const DeviceOperands<T> in, const DeviceRows<S> y, const int32_t tile_rows, T* workspace,
                        double* partial) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank_out);
  const Weights<T, false> input_weight{in.input_weight, in.rank_in, in.width};
  const Weights<T, false> output_weight{in.output_weight, in.width, in.rank_out};
  const KeptRows<T> kept{workspace + int64_t(blockIdx.x) * tile_rows * in.width, in.width};
  double* sums = partial + int64_t(blockIdx.x) * in.width;
  T* inverse = staging.rows[0];
  for (int32_t column = thread(); column < in.width; column += kThreads) sums[column] = 0;

  for_each_tile(y.count, tile_rows, [&](const Tile& at) {
    const int64_t first_row = at.first_row();
    const int32_t rows = at.rows;
    const TileRows<S> tile(y, first_row);
    project(tile, rows, input_weight, staging, coefficients);
    map_blocks(in, rows, coefficients, coefficients);
    rebuild(coefficients, rows, output_weight, staging, kept);
    const InitialRow<S, T> complete{in, tile};
    for_each_row(rows, [&](int32_t row) {
      T* w = kept.row(row);
      T squares = T(0);
      transform_columns(in.width, [&](int32_t j) { return complete(row, j, w[j]); },
                        [&](int32_t j, T value) {
                          w[j] = value;
                          squares += value * value;
                        });
      const RowScales<T> scales = row_scales(sum_over_warp(squares), T(0), T(0), false);
      if (fresh_thread() % kWarp == 0) inverse[row] = scales.inverse;
    });
    __syncthreads();
    for (int32_t column = thread(); column < in.width; column += kThreads) {
      double sum = 0;
#pragma unroll 8
      for (int32_t row = 0; row < rows; ++row) sum += double(kept(row, column) * inverse[row]);
      sums[column] += sum;
    }
    __syncthreads();
  });
}

__global__ void __launch_bounds__(kThreads)
    add_blocks_kernel(const double* partial, const int32_t blocks, const int32_t width, double* sums) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= width) return;
  double sum = 0;
#pragma unroll 8
  for (int32_t block = 0; block < blocks; ++block) sum += partial[int64_t(block) * width + column];
  sums[column] = sum;
}

}  // namespace

template <typename S>
cudaError_t sums_workspace(int64_t rows, int32_t width, int64_t* bytes) {
  using T = typename Working<S>::type;
  int64_t blocks = 0, in_flight = 0;
  const cudaError_t error = rows_in_flight(rows, &blocks, &in_flight);
  *bytes = width * (blocks * int64_t(sizeof(double)) + in_flight * int64_t(sizeof(T)));
  return error;
}

template <typename S, typename T>
cudaError_t launch_correct_sums(const DeviceOperands<T>& operands, const DeviceRows<S>& y, double* sums,
                                Products products, Workspace workspace, cudaStream_t stream) {
  if (!valid(operands) || y.count < 0) return cudaErrorInvalidValue;
  int64_t blocks = 0, in_flight = 0;
  const cudaError_t found = rows_in_flight(y.count, &blocks, &in_flight);
  if (found != cudaSuccess) return found;
  double* partial = static_cast<double*>(workspace.data);
  T* rows = reinterpret_cast<T*>(partial + blocks * operands.width);
  const int64_t row_bytes = operands.width * int64_t(sizeof(T));
  const int64_t rows_bytes = workspace.bytes - blocks * operands.width * int64_t(sizeof(double));
  const uint32_t columns = uint32_t((operands.width + kThreads - 1) / kThreads);
  int32_t grid = 0;
  if (y.count > 0) {
    const cudaError_t launched = with_engine<S>(products, [&](auto engine) {
      using E = decltype(engine);
      Plan plan;
      const cudaError_t error = plan_launch<E>(correct_sums_kernel<S, E, T>, y.count, padded<E>(operands.rank_out),
                                               row_bytes, rows_bytes, &plan);
      if (error != cudaSuccess) return error;
      grid = plan.grid;
      correct_sums_kernel<S, E, T>
          <<<plan.grid, kThreads, plan.shared_bytes, stream>>>(operands, y, plan.tile_rows, rows, partial);
      return cudaGetLastError();
    });
    if (launched != cudaSuccess) return launched;
  }
  add_blocks_kernel<<<columns, kThreads, 0, stream>>>(partial, grid, operands.width, sums);
  return cudaGetLastError();
}

#define ANISO_INSTANTIATE(S, T)                                                                                \
  template cudaError_t sums_workspace<S>(int64_t, int32_t, int64_t*);                                          \
  template cudaError_t launch_correct_sums<S, T>(const DeviceOperands<T>&, const DeviceRows<S>&, double*, Products, \
                                                 Workspace, cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
