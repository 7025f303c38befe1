// Gradient of the bounded update (decode.cu) with respect to the state and the deltas.
//
//   grad_w = gradient at w from that at e (row_scales.h)      grad_v0 = grad_w      grad_c = Q^T grad_w
//   grad of sin, cos, log rho, dtheta, drho: turn_backward(grad_c)
//   grad_dv = a_v (1 - tanh(dv)^2) (grad_w - Q grad_c)        without the last term unless the update projects
//
// Shapes   grad [N, D]; state, grad_state [N, 3M + D]; deltas, grad_deltas [N, R + D]; Q [D, R].
// Grid     as in decode.cu.
// Shared   k, 64 R sums, whose place grad_c takes; staging.
// Global   as in decode.cu; grad is read twice and Q streams from L2 four times a tile. w, then grad_w and
//          Q grad_c are kept in the results or in the workspace. From memory: 10M + 5 D storage values per row.
// FLOP     8 D R per row (4 D R without project), three times that on tensor cores (Split); 4 D tanh.
#include "tile_updates.cuh"

namespace aniso {
namespace {

template <typename S, typename E, typename T>
__global__ void __launch_bounds__(kThreads, E::kBlocksPerProcessor)
    decode_backward_kernel(const DeviceUpdate<T> in, const DeviceRows<S> grad, const DeviceRows<S> state,
                           const DeviceRows<S> deltas, const int32_t tile_rows, T* workspace, S* grad_state,
                           S* grad_deltas) {
  Staging<E>& staging = shared_memory<E>().staging;
  T* memory = coefficient_memory<E>();
  const Lines<E> coefficients = take_lines<E>(memory, tile_rows, in.rank);
  const int32_t blocks = in.rank / 2;
  const int32_t state_columns = 3 * blocks + in.width, delta_columns = in.rank + in.width;

  for_each_tile(state.count, tile_rows, [&](const Tile& at) {
    const int32_t rows = at.rows;
    const auto kept_in = [&](int64_t row) {
      S* complement = result_row(grad_state, row, state_columns) + 3 * blocks;
      return kept_rows(complement, state_columns, workspace, tile_rows, 2 * in.width);
    };
    {
      const UpdateTile<S, T> tile(in, state, deltas, at.first_row());
      const KeptRows<T> kept = kept_in(at.first_row());
      rebuild_update(in, tile, rows, staging, coefficients, kept);
      finish_backward(kept, tile, TileRows<S>(grad, at.first_row()), rows, in.width, in.shift);
    }
    project(kept_in(at.first_row()), rows, Weights<T, true>{in.basis, in.rank, in.width}, staging, coefficients);
    {
      const UpdateTile<S, T> tile(in, state, deltas, at.first_row());
      for_each_block<true>(
          rows, blocks, [&](int32_t row, int32_t block) { return tile.turned(row, block); },
          [&](int32_t row, int32_t block, const Turn<T>& t) {
            const T grad_a = coefficients.raw(row, 2 * block), grad_b = coefficients.raw(row, 2 * block + 1);
            const TurnGradient<T> g = turn_backward(t, grad_a, grad_b, in.a_theta, in.a_rho);
            S* polar = result_row(grad_state, at.first_row() + row, state_columns) + block;
            polar[0] = narrow<S>(g.sin0);
            polar[blocks] = narrow<S>(g.cos0);
            polar[2 * blocks] = narrow<S>(g.log_radius);
            S* turns = result_row(grad_deltas, at.first_row() + row, delta_columns) + block;
            turns[0] = narrow<S>(g.delta_theta);
            turns[blocks] = narrow<S>(g.delta_rho);
            if (in.project) coefficients.put(row, 2 * block, grad_a, grad_b);
          });
    }
    __syncthreads();
    const auto leak_in = [&](int64_t row) -> KeptRows<T> {
      if constexpr (std::is_same_v<S, T>) {
        return {result_row(grad_deltas, row, delta_columns) + in.rank, delta_columns};
      } else {
        return {kept_in(row).data + in.width, 2 * in.width};
      }
    };
    if (in.project) {
      const Weights<T, false> weight{in.basis, in.width, in.rank};
      rebuild(coefficients, rows, weight, staging, leak_in(at.first_row()));
    }
    const KeptRows<T> kept = kept_in(at.first_row()), leak = leak_in(at.first_row());
    if constexpr (!std::is_same_v<S, T>) {
      S* complement = result_row(grad_state, at.first_row(), state_columns) + 3 * blocks;
      store_rows(kept, Unchanged{}, rows, in.width, complement, state_columns);
    }
    const TileRows<S> moves(deltas, at.first_row(), in.rank);
    const auto move_gradient = [&](int32_t row, int32_t column, T gradient) {
      const T tanh = tanh_of(moves(row, column));
      return in.a_v * (T(1) - tanh * tanh) * (in.project ? gradient - leak(row, column) : gradient);
    };
    S* result = result_row(grad_deltas, at.first_row(), delta_columns) + in.rank;
    store_rows(kept, move_gradient, rows, in.width, result, delta_columns);
  });
}

}  // namespace

template <typename S, typename T>
cudaError_t launch_decode_backward(const DeviceUpdate<T>& update, const DeviceRows<S>& grad,
                                   const DeviceRows<S>& state, const DeviceRows<S>& deltas, S* grad_state,
                                   S* grad_deltas, Products products, Workspace workspace, cudaStream_t stream) {
  if (!valid(update) || !same_rows(state, deltas) || !same_rows(grad, state)) return cudaErrorInvalidValue;
  if (state.count == 0) return cudaSuccess;
  return with_engine<S>(products, [&](auto engine) {
    using E = decltype(engine);
    Plan plan;
    const cudaError_t error = plan_launch<E>(decode_backward_kernel<S, E, T>, state.count, padded<E>(update.rank),
                                             2 * kept_bytes<S>(update.width), workspace.bytes, &plan);
    if (error != cudaSuccess) return error;
    decode_backward_kernel<S, E, T><<<plan.grid, kThreads, plan.shared_bytes, stream>>>(
        update, grad, state, deltas, plan.tile_rows, static_cast<T*>(workspace.data), grad_state, grad_deltas);
    return cudaGetLastError();
  });
}

#define ANISO_INSTANTIATE(S, T)                                                                                  \
  template cudaError_t launch_decode_backward<S, T>(const DeviceUpdate<T>&, const DeviceRows<S>&,                \
                                                    const DeviceRows<S>&, const DeviceRows<S>&, S*, S*, Products, \
                                                    Workspace, cudaStream_t);
ANISO_INSTANTIATE(double, double)
ANISO_INSTANTIATE(float, float)
ANISO_INSTANTIATE(Float16, float)
ANISO_INSTANTIATE(BFloat16, float)
#undef ANISO_INSTANTIATE

}  // namespace aniso
