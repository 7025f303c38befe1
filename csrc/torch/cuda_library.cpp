// Registration of the CUDA operators; the schemas are defined in aniso_ext/ops/schemas.py. Compiled in CUDA
// builds only.
#include <torch/csrc/stable/library.h>

#include "cuda_ops.h"

namespace aniso_torch {
namespace {

Tensor correct_cuda(Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments,
                    Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale, Tensor offset,
                    std::optional<Tensor> shift) {
  return correct_on_cuda(y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight,
                             scale, offset, shift});
}

Tensor correct_sums_cuda(Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments,
                         Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale, Tensor offset) {
  return correct_sums_on_cuda(y, {input_weight, input_bias, target_coordinates, segments, buckets, windows,
                                  output_weight, scale, offset, std::nullopt});
}

Tensor correct_backward_cuda(Tensor grad, Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates,
                             Tensor segments, Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale,
                             Tensor offset, std::optional<Tensor> shift) {
  return correct_backward_on_cuda(grad, y, {input_weight, input_bias, target_coordinates, segments, buckets, windows,
                                            output_weight, scale, offset, shift});
}

Tensor encode_cuda(Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments,
                   Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale, Tensor offset) {
  return encode_on_cuda(y, {input_weight, input_bias, target_coordinates, segments, buckets, windows, output_weight,
                            scale, offset, std::nullopt});
}

Tensor encode_backward_cuda(Tensor grad, Tensor y, Tensor input_weight, Tensor input_bias, Tensor target_coordinates,
                            Tensor segments, Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale,
                            Tensor offset) {
  return encode_backward_on_cuda(grad, y, {input_weight, input_bias, target_coordinates, segments, buckets, windows,
                                           output_weight, scale, offset, std::nullopt});
}

Tensor decode_cuda(Tensor state, Tensor deltas, Tensor basis, std::optional<Tensor> shift, double a_theta,
                   double a_rho, double a_v, bool project) {
  return decode_on_cuda(state, deltas, {basis, shift, a_theta, a_rho, a_v, project});
}

std::tuple<Tensor, Tensor> decode_backward_cuda(Tensor grad, Tensor state, Tensor deltas, Tensor basis,
                                                std::optional<Tensor> shift, double a_theta, double a_rho, double a_v,
                                                bool project) {
  return decode_backward_on_cuda(grad, state, deltas, {basis, shift, a_theta, a_rho, a_v, project});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aniso_ext, CUDA, m) {
  m.impl("correct", TORCH_BOX(&correct_cuda));
  m.impl("correct_sums", TORCH_BOX(&correct_sums_cuda));
  m.impl("correct_backward", TORCH_BOX(&correct_backward_cuda));
  m.impl("encode", TORCH_BOX(&encode_cuda));
  m.impl("encode_backward", TORCH_BOX(&encode_backward_cuda));
  m.impl("decode", TORCH_BOX(&decode_cuda));
  m.impl("decode_backward", TORCH_BOX(&decode_backward_cuda));
}

}  // namespace aniso_torch
