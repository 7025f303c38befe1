// The operators on CUDA tensors; arguments as in aniso_ext/ops/schemas.py.
#pragma once

#include "cpu_ops.h"

namespace aniso_torch {

Tensor correct_on_cuda(const Tensor& y, const InitialisationTensors& in);

}  // namespace aniso_torch
