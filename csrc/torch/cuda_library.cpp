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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aniso_ext, CUDA, m) { m.impl("correct", TORCH_BOX(&correct_cuda)); }

}  // namespace aniso_torch
