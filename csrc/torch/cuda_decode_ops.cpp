// `decode` on CUDA: check -> parameters -> launch on the current stream of the rows' device.
#include "cuda_arguments.h"
#include "cuda_ops.h"

namespace aniso_torch {
namespace {

template <typename T>
aniso::DeviceUpdate<T> checked_update(const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  check(in.basis.dim() == 2, "basis must be a matrix");
  const int64_t width = in.basis.size(0), rank = in.basis.size(1);
  check(rank >= 2 && rank % 2 == 0, "the rank must be even and at least 2, got ", rank);
  check(width >= 1 && width <= kLargestSize && rank <= kLargestSize, "a size exceeds ", kLargestSize);
  check_rows(state, "state", state, rank / 2 * 3 + width);
  check_rows(deltas, "deltas", state, rank + width);
  check_constant(in.basis, "basis", state, working_dtype<T>(), width * rank);
  if (in.shift) check_constant(*in.shift, "shift", state, working_dtype<T>(), width);
  return {int32_t(width), int32_t(rank), T(in.a_theta), T(in.a_rho), T(in.a_v), in.project,
          data<T>(in.basis), in.shift ? data<T>(*in.shift) : nullptr};
}

}  // namespace

Tensor decode_on_cuda(const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  check(state.is_cuda(), "state must be a CUDA tensor");
  const DeviceGuard guard(state.get_device_index());
  Tensor out;
  dispatch(state, [&](auto storage) {
    using S = decltype(storage);
    const auto update = checked_update<typename Working<S>::type>(state, deltas, in);
    out = torch::stable::new_empty(state, {state.size(0), update.width});
    LaunchMemory memory = memory_for_rows<S>(state, update.width);
    check_launch(aniso::launch_decode(update, device_rows<S>(state), device_rows<S>(deltas), mutable_data<S>(out),
                                      float32_products(), memory.workspace(), stream_of(state)),
                 "decode");
  });
  return out;
}

std::tuple<Tensor, Tensor> decode_backward_on_cuda(
    const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  check(state.is_cuda(), "state must be a CUDA tensor");
  const DeviceGuard guard(state.get_device_index());
  Tensor grad_state, grad_deltas;
  dispatch(state, [&](auto storage) {
    using S = decltype(storage);
    const auto update = checked_update<typename Working<S>::type>(state, deltas, in);
    check_rows(grad, "grad", state, update.width);
    grad_state = torch::stable::new_empty(state, {state.size(0), state.size(1)});
    grad_deltas = torch::stable::new_empty(deltas, {deltas.size(0), deltas.size(1)});
    LaunchMemory memory = memory_for_rows<S>(state, 2 * int64_t(update.width));
    check_launch(aniso::launch_decode_backward(update, device_rows<S>(grad), device_rows<S>(state),
                                               device_rows<S>(deltas), mutable_data<S>(grad_state),
                                               mutable_data<S>(grad_deltas), float32_products(), memory.workspace(),
                                               stream_of(state)),
                 "decode_backward");
  });
  return {grad_state, grad_deltas};
}

}  // namespace aniso_torch
