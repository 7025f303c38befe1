// The operators on CUDA tensors.
#pragma once

#include "arguments.h"

namespace aniso_torch {

Tensor correct_on_cuda(const Tensor& y, const InitialisationTensors& in);

}  // namespace aniso_torch
