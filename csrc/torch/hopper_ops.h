// The operators of the Hopper kernels.
#pragma once

#include <tuple>

#include "arguments.h"

namespace aniso_torch {

// The fields of aniso_ext/ops/hopper.py.
struct HopperTensors {
  Tensor basis;
  Tensor shuffled;
  Tensor coordinates;
  Tensor cells;
  Tensor map_scales;
};

Tensor hopper_correct(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
Tensor hopper_correct_sums(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
Tensor hopper_correct_backward(const Tensor& grad, const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
Tensor hopper_encode(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
Tensor hopper_encode_backward(const Tensor& grad, const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in);
// `shuffled` as in aniso/cuda_sm90.h; the basis of `in` only tells the shape.
Tensor hopper_decode(const Tensor& state, const Tensor& deltas, const Tensor& shuffled, const UpdateArguments& in);
std::tuple<Tensor, Tensor> hopper_decode_backward(const Tensor& grad, const Tensor& state, const Tensor& deltas, const Tensor& shuffled,
                                                  const UpdateArguments& in);

}  // namespace aniso_torch
