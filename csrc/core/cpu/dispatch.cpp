// Choice of the row kernels at run time.
#include "cpu_features.h"
#include "row_kernels_table.h"

namespace aniso {
namespace {

const RowKernelTable& chosen_table() {
#if defined(ANISO_X86_DISPATCH)
  switch (chosen_isa()) {
    case Isa::avx512:
      return avx512::table();
    case Isa::avx2:
      return avx2::table();
    case Isa::baseline:
      break;
  }
#endif
  return baseline::table();
}

}  // namespace

template <>
const RowKernels<double, double>& row_kernels() {
  return chosen_table().fp64;
}
template <>
const RowKernels<float, float>& row_kernels() {
  return chosen_table().fp32;
}
template <>
const RowKernels<Float16, float>& row_kernels() {
  return chosen_table().fp16;
}
template <>
const RowKernels<BFloat16, float>& row_kernels() {
  return chosen_table().bf16_widened;
}
template <>
const RowKernels<BFloat16, BFloat16>& row_kernels() {
  return chosen_table().bf16;
}

}  // namespace aniso
