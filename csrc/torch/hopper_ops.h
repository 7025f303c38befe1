// The operators of the Hopper kernels.
#pragma once

#include "arguments.h"

namespace aniso_torch {

// The fields of aniso_ext/ops/hopper.py.
struct HopperTensors {
  Tensor basis;
  Tensor coordinates;
  Tensor cells;
  Tensor map_scales;
};

Tensor hopper_correct(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
Tensor hopper_correct_sums(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
Tensor hopper_encode(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);

}  // namespace aniso_torch
