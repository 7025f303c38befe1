// The row kernels of one instruction set, for every supported pair of formats.
#pragma once

#include "aniso/row_kernels.h"

namespace aniso {

struct RowKernelTable {
  RowKernels<double, double> fp64;
  RowKernels<float, float> fp32;
  RowKernels<Float16, float> fp16;
  RowKernels<BFloat16, float> bf16_widened;
  RowKernels<BFloat16, BFloat16> bf16;
};

namespace baseline {
const RowKernelTable& table();
}
namespace avx2 {
const RowKernelTable& table();
}
namespace avx512 {
const RowKernelTable& table();
}

}  // namespace aniso
