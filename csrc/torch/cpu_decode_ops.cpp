// `decode` on the CPU: check -> parameters -> chunks of rows, each moved, rebuilt and finished.
#include "cpu_ops.h"

#include "cpu_chunks.h"

namespace aniso_torch {
namespace {

using aniso::RowKernels;

template <typename P>
aniso::Update<typename Working<P>::type> checked_update(const UpdateArguments& in, const Tensor& state, const Tensor& deltas) {
  using T = typename Working<P>::type;
  const int64_t width = in.basis.size(0), rank = in.basis.size(1);
  check(rank >= 2 && rank % 2 == 0, "the rank must be even and at least 2, got ", rank);
  check_matrix(state, "state", rank / 2 * 3 + width);
  check_matrix(deltas, "deltas", rank + width);
  check(state.size(0) == deltas.size(0), "state and deltas differ in rows");
  check(state.scalar_type() == deltas.scalar_type(), "state and deltas differ in dtype");
  if (in.shift) check_constant(*in.shift, "shift", working_dtype<T>(), width);
  return {int32_t(width), int32_t(rank), T(in.a_theta), T(in.a_rho), T(in.a_v), in.project,
          in.shift ? data<T>(*in.shift) : nullptr};
}

Tensor product_if(bool wanted, const Product& product, const void* rows, int64_t n) {
  return wanted ? product(rows, n) : Tensor();
}

template <typename P>
const P* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? data<P>(tensor) : nullptr;
}

template <typename S, typename P>
void run_decode(const Tensor& state, const Tensor& deltas, const UpdateArguments& in, Tensor& out) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const aniso::Update<T> update = checked_update<P>(in, state, deltas);
  const Chunks<S, P> states(state), moves(deltas);
  const int64_t total = state.size(0);
  const Product project(transposed(in.basis), total), rebuild(in.basis, total);
  S* result = mutable_data<S>(out);
  for_each_chunk<P>(total, [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* state_rows = states.rows(first, n, work.rows);
    const P* delta_rows = moves.rows(first, n, work.deltas);
    P* step = work.step.sized(n * update.width);
    P* coefficients = work.coefficients.sized(n * update.rank);
    kernels.decode_step(update, n, delta_rows, step);
    const Tensor leak = product_if(update.project, project, step, n);
    kernels.decode_map(update, n, state_rows, delta_rows, data_or_null<P>(leak), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.decode_finish(update, n, data<P>(rebuilt), state_rows, step, work.scratch.sized(update.width),
                          result + first * update.width);
  });
}

template <typename S, typename P>
void run_decode_backward(const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in,
                         Tensor& grad_state, Tensor& grad_deltas) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const aniso::Update<T> update = checked_update<P>(in, state, deltas);
  const Chunks<S, P> states(state), moves(deltas), grads(grad);
  const int64_t total = state.size(0);
  const Product project(transposed(in.basis), total), rebuild(in.basis, total);
  S *state_result = mutable_data<S>(grad_state), *delta_result = mutable_data<S>(grad_deltas);
  for_each_chunk<P>(total, [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* state_rows = states.rows(first, n, work.rows);
    const P* delta_rows = moves.rows(first, n, work.deltas);
    P* step = work.step.sized(n * update.width);
    P* coefficients = work.coefficients.sized(n * update.rank);
    P* grad_row = work.grad_row.sized(n * update.width);
    kernels.decode_step(update, n, delta_rows, step);
    const Tensor step_leak = product_if(update.project, project, step, n);
    kernels.decode_map(update, n, state_rows, delta_rows, data_or_null<P>(step_leak), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.decode_finish_backward(update, n, data<P>(rebuilt), state_rows, step, grads.rows(first, n, work.grad),
                                   work.scratch.sized(update.width), grad_row);
    const Tensor grad_coefficients = project(grad_row, n);
    const Tensor leak = product_if(update.project, rebuild, data<P>(grad_coefficients), n);
    kernels.decode_backward(update, n, state_rows, delta_rows, data<P>(grad_coefficients), grad_row,
                            data_or_null<P>(leak), state_result + first * state.size(1),
                            delta_result + first * deltas.size(1));
  });
}

}  // namespace

Tensor decode(const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  Tensor out = empty_rows(state, state.size(0), in.basis.size(0));
  dispatch(state, in.basis, [&](auto s, auto p) { run_decode<decltype(s), decltype(p)>(state, deltas, in, out); });
  return out;
}

std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  check_grad(grad, state, in.basis.size(0));
  Tensor grad_state = empty_rows(state, state.size(0), state.size(1));
  Tensor grad_deltas = empty_rows(deltas, deltas.size(0), deltas.size(1));
  dispatch(state, in.basis, [&](auto s, auto p) {
    run_decode_backward<decltype(s), decltype(p)>(grad, state, deltas, in, grad_state, grad_deltas);
  });
  return {grad_state, grad_deltas};
}

}  // namespace aniso_torch
