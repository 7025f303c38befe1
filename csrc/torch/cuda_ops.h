// The operators on CUDA tensors.
#pragma once

#include <tuple>

#include "arguments.h"

namespace aniso_torch {

Tensor correct_on_cuda(const Tensor& y, const InitialisationTensors& in);
Tensor correct_sums_on_cuda(const Tensor& y, const InitialisationTensors& in);
Tensor correct_backward_on_cuda(const Tensor& grad, const Tensor& y, const InitialisationTensors& in);
Tensor encode_on_cuda(const Tensor& y, const InitialisationTensors& in);
Tensor encode_backward_on_cuda(const Tensor& grad, const Tensor& y, const InitialisationTensors& in);
Tensor decode_on_cuda(const Tensor& state, const Tensor& deltas, const UpdateArguments& in);
std::tuple<Tensor, Tensor> decode_backward_on_cuda(
    const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in);

}  // namespace aniso_torch
