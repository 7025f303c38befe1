// Arguments of the operators, as in aniso_ext/ops/schemas.py, for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

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

}  // namespace aniso_torch
