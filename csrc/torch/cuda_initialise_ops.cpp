// `correct` and `encode` on CUDA: check -> parameters -> launch on the current stream of the rows' device.
#include <atomic>

#include "cuda_arguments.h"
#include "cuda_ops.h"

namespace aniso_torch {
namespace {

std::atomic<bool> split_float32{false};

}  // namespace

aniso::Products float32_products() {
  return split_float32.load(std::memory_order_relaxed) ? aniso::Products::split : aniso::Products::ieee;
}

Tensor correct_on_cuda(const Tensor& y, const InitialisationTensors& in) {
  check(y.is_cuda(), "y must be a CUDA tensor");
  const DeviceGuard guard(y.get_device_index());
  Tensor out;
  dispatch(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_operands<typename Working<S>::type>(y, in);
    out = torch::stable::new_empty(y, {y.size(0), y.size(1)});
    LaunchMemory memory = memory_for_rows<S>(y, operands.width);
    check_launch(aniso::launch_correct(operands, device_rows<S>(y), mutable_data<S>(out), float32_products(),
                                       memory.workspace(), stream_of(y)),
                 "correct");
  });
  return out;
}

Tensor correct_sums_on_cuda(const Tensor& y, const InitialisationTensors& in) {
  check(y.is_cuda(), "y must be a CUDA tensor");
  const DeviceGuard guard(y.get_device_index());
  Tensor sums;
  dispatch(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_operands<typename Working<S>::type>(y, in);
    sums = torch::stable::new_empty(y, {y.size(1)}, ScalarType::Double);
    int64_t bytes = 0;
    check_launch(aniso::sums_workspace<S>(y.size(0), operands.width, &bytes), "correct_sums");
    LaunchMemory memory(y, bytes);
    check_launch(aniso::launch_correct_sums(operands, device_rows<S>(y), mutable_data<double>(sums), float32_products(),
                                            memory.workspace(), stream_of(y)),
                 "correct_sums");
  });
  return sums;
}

Tensor correct_backward_on_cuda(const Tensor& grad, const Tensor& y, const InitialisationTensors& in) {
  check(y.is_cuda(), "y must be a CUDA tensor");
  const DeviceGuard guard(y.get_device_index());
  Tensor grad_y;
  dispatch(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_operands<typename Working<S>::type>(y, in);
    check_rows(grad, "grad", y, operands.width);
    grad_y = torch::stable::new_empty(y, {y.size(0), y.size(1)});
    LaunchMemory memory = memory_for_rows<S>(y, operands.width);
    check_launch(
        aniso::launch_correct_backward(operands, device_rows<S>(grad), device_rows<S>(y), mutable_data<S>(grad_y),
                                       float32_products(), memory.workspace(), stream_of(y)),
        "correct_backward");
  });
  return grad_y;
}

Tensor encode_on_cuda(const Tensor& y, const InitialisationTensors& in) {
  check(y.is_cuda(), "y must be a CUDA tensor");
  const DeviceGuard guard(y.get_device_index());
  Tensor out;
  dispatch(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_operands<typename Working<S>::type>(y, in);
    out = torch::stable::new_empty(y, {y.size(0), int64_t(operands.rank) / 2 * 3 + operands.width});
    LaunchMemory memory = memory_for_rows<S>(y, operands.width);
    check_launch(aniso::launch_encode(operands, device_rows<S>(y), mutable_data<S>(out), float32_products(),
                                      memory.workspace(), stream_of(y)),
                 "encode");
  });
  return out;
}

Tensor encode_backward_on_cuda(const Tensor& grad, const Tensor& y, const InitialisationTensors& in) {
  check(y.is_cuda(), "y must be a CUDA tensor");
  const DeviceGuard guard(y.get_device_index());
  Tensor grad_y;
  dispatch(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_operands<typename Working<S>::type>(y, in);
    check_rows(grad, "grad", y, int64_t(operands.rank) / 2 * 3 + operands.width);
    grad_y = torch::stable::new_empty(y, {y.size(0), y.size(1)});
    check_launch(aniso::launch_encode_backward(operands, device_rows<S>(grad), device_rows<S>(y),
                                               mutable_data<S>(grad_y), float32_products(), stream_of(y)),
                 "encode_backward");
  });
  return grad_y;
}

}  // namespace aniso_torch

// Called through ctypes by aniso_ext/ops/cuda_native.py: whether products of float32 rows may take the tensor cores.
extern "C" __attribute__((visibility("default"))) void aniso_cuda_split_float32(int allowed) {
  aniso_torch::split_float32.store(allowed != 0, std::memory_order_relaxed);
}
