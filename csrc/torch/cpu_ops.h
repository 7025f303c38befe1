// The operators on CPU tensors.
#pragma once

#include <tuple>

#include "arguments.h"

namespace aniso_torch {

Tensor correct(const Tensor& y, const InitialisationTensors& in);
void correct_into(const Tensor& y, const InitialisationTensors& in, Tensor& out);
Tensor correct_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in);
Tensor encode(const Tensor& y, const InitialisationTensors& in);
Tensor encode_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in);
Tensor decode(const Tensor& state, const Tensor& deltas, const UpdateArguments& in);
std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in);

}  // namespace aniso_torch
