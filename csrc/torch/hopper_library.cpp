// Registration of the Hopper operators; the schemas are defined in aniso_ext/ops/schemas.py. Compiled in CUDA builds only.
#include <torch/csrc/stable/library.h>

#include "hopper_ops.h"

namespace aniso_torch {
namespace {

Tensor correct(Tensor y, Tensor basis, Tensor shuffled, Tensor coordinates, Tensor cells, Tensor map_scales, Tensor input_weight, Tensor input_bias,
               Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale,
               Tensor offset, std::optional<Tensor> shift) {
  return hopper_correct(y, {basis, shuffled, coordinates, cells, map_scales},
                        {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset,
                         shift});
}

Tensor correct_backward(Tensor grad, Tensor y, Tensor basis, Tensor shuffled, Tensor coordinates, Tensor cells, Tensor map_scales,
                        Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows,
                        Tensor output_weight, Tensor scale, Tensor offset, std::optional<Tensor> shift) {
  return hopper_correct_backward(grad, y, {basis, shuffled, coordinates, cells, map_scales},
                                 {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale,
                                  offset, shift});
}

Tensor correct_sums(Tensor y, Tensor basis, Tensor shuffled, Tensor coordinates, Tensor cells, Tensor map_scales, Tensor input_weight,
                    Tensor input_bias, Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows,
                    Tensor output_weight, Tensor scale, Tensor offset) {
  return hopper_correct_sums(y, {basis, shuffled, coordinates, cells, map_scales},
                             {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale,
                              offset, std::nullopt});
}

Tensor encode(Tensor y, Tensor basis, Tensor shuffled, Tensor coordinates, Tensor cells, Tensor map_scales, Tensor input_weight, Tensor input_bias,
              Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale,
              Tensor offset) {
  return hopper_encode(y, {basis, shuffled, coordinates, cells, map_scales},
                       {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale, offset,
                        std::nullopt});
}

Tensor encode_backward(Tensor grad, Tensor y, Tensor basis, Tensor shuffled, Tensor coordinates, Tensor cells, Tensor map_scales,
                       Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments, Tensor buckets, Tensor windows,
                       Tensor output_weight, Tensor scale, Tensor offset) {
  return hopper_encode_backward(grad, y, {basis, shuffled, coordinates, cells, map_scales},
                                {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight, scale,
                                 offset, std::nullopt});
}

Tensor decode(Tensor state, Tensor deltas, Tensor shuffled, Tensor basis, std::optional<Tensor> shift, double a_theta, double a_rho,
              double a_v, bool project) {
  return hopper_decode(state, deltas, shuffled, {basis, shift, a_theta, a_rho, a_v, project});
}

std::tuple<Tensor, Tensor> decode_backward(Tensor grad, Tensor state, Tensor deltas, Tensor shuffled, Tensor basis,
                                           std::optional<Tensor> shift, double a_theta, double a_rho, double a_v, bool project) {
  return hopper_decode_backward(grad, state, deltas, shuffled, {basis, shift, a_theta, a_rho, a_v, project});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aniso_ext, CUDA, m) {
  m.impl("hopper_correct", TORCH_BOX(&correct));
  m.impl("hopper_correct_backward", TORCH_BOX(&correct_backward));
  m.impl("hopper_correct_sums", TORCH_BOX(&correct_sums));
  m.impl("hopper_encode", TORCH_BOX(&encode));
  m.impl("hopper_encode_backward", TORCH_BOX(&encode_backward));
  m.impl("hopper_decode", TORCH_BOX(&decode));
  m.impl("hopper_decode_backward", TORCH_BOX(&decode_backward));
}

}  // namespace aniso_torch
