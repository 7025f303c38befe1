// Registration of the operators; the schemas are defined in aniso_ext/ops/schemas.py, which is imported before this library.
#include <torch/csrc/stable/library.h>

#include "cpu_ops.h"

namespace aniso_torch {
namespace {

Tensor correct_cpu(Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows,
                   Tensor output_weight, Tensor scale, Tensor offset, std::optional<Tensor> shift) {
  return correct(
      y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset, shift});
}

void correct_into_cpu(Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments, Tensor buckets,
                      Tensor windows, Tensor output_weight, Tensor scale, Tensor offset, std::optional<Tensor> shift, Tensor out) {
  correct_into(y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset, shift},
               out);
}

Tensor correct_backward_cpu(Tensor grad, Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates,
                            Tensor segments, Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale, Tensor offset,
                            std::optional<Tensor> shift) {
  return correct_backward(
      grad, y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset, shift});
}

Tensor encode_cpu(Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows,
                  Tensor output_weight, Tensor scale, Tensor offset) {
  return encode(
      y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset, std::nullopt});
}

Tensor encode_backward_cpu(Tensor grad, Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates,
                           Tensor segments, Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale, Tensor offset) {
  return encode_backward(
      grad, y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset, std::nullopt});
}

Tensor decode_cpu(Tensor state, Tensor deltas, Tensor basis, std::optional<Tensor> shift, double a_theta, double a_rho,
                  double a_v, bool project) {
  return decode(state, deltas, {basis, shift, a_theta, a_rho, a_v, project});
}

std::tuple<Tensor, Tensor> decode_backward_cpu(Tensor grad, Tensor state, Tensor deltas, Tensor basis,
                                               std::optional<Tensor> shift, double a_theta, double a_rho, double a_v,
                                               bool project) {
  return decode_backward(grad, state, deltas, {basis, shift, a_theta, a_rho, a_v, project});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aniso_ext, CPU, m) {
  m.impl("correct", TORCH_BOX(&correct_cpu));
  m.impl("correct_into", TORCH_BOX(&correct_into_cpu));
  m.impl("correct_backward", TORCH_BOX(&correct_backward_cpu));
  m.impl("encode", TORCH_BOX(&encode_cpu));
  m.impl("encode_backward", TORCH_BOX(&encode_backward_cpu));
  m.impl("decode", TORCH_BOX(&decode_cpu));
  m.impl("decode_backward", TORCH_BOX(&decode_backward_cpu));
}

}  // namespace aniso_torch
