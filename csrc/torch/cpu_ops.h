// The operators on CPU tensors; arguments as in aniso_ext/ops/schemas.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace aniso_torch {

using torch::stable::Tensor;

struct InitialisationTensors {
  Tensor input_weight;
  Tensor input_bias;
  Tensor target_coordinates;
  Tensor segments;
  Tensor buckets;
  Tensor windows;
  Tensor output_weight;
  Tensor scale;
  Tensor offset;
  std::optional<Tensor> shift;
};

struct UpdateArguments {
  Tensor basis;
  std::optional<Tensor> shift;
  double a_theta;
  double a_rho;
  double a_v;
  bool project;
};

Tensor correct(const Tensor& y, const InitialisationTensors& in);
Tensor correct_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in);
Tensor encode(const Tensor& y, const InitialisationTensors& in);
Tensor encode_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in);
Tensor decode(const Tensor& state, const Tensor& deltas, const UpdateArguments& in);
std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in);

}  // namespace aniso_torch
