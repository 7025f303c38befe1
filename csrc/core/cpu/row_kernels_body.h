// All row kernels, compiled once per instruction set: the including file sets the target and ANISO_ISA, a namespace name.
#include <cmath>
#include <cstdint>

#include "aniso/block_math.h"
#include "aniso/elementary.h"
#include "aniso/row_kernels.h"
#include "aniso/row_scales.h"
#include "aniso/turn.h"
#include "row_kernels_table.h"

namespace aniso {
namespace ANISO_ISA {
namespace {

#include "row_norms.h"

#include "initialise_rows.h"

#include "decode_rows.h"

template <typename S, typename P>
void load(const S* source, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, P* chunk) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* row = source + i * row_stride;
    P* out = chunk + i * columns;
    if (column_stride == 1) {
      ANISO_SIMD
      for (int64_t j = 0; j < columns; ++j) out[j] = narrow<P>(widen(row[j]));
    } else {
      for (int64_t j = 0; j < columns; ++j) out[j] = narrow<P>(widen(row[j * column_stride]));
    }
  }
}

template <typename S, typename P>
RowKernels<S, P> make() {
  using T = typename Working<P>::type;
  return {
      load<S, P>,
      load<S, T>,
      correct_map<P, T>,
      correct_finish<S, P, T>,
      correct_finish_backward<P, T>,
      correct_map_backward<P, T>,
      add_scaled<S, P, T>,
      encode_map<S, P, T>,
      encode_finish<S, P, T>,
      encode_map_backward<P, T>,
      decode_step<P, T>,
      decode_map<P, T>,
      decode_finish<S, P, T>,
      decode_finish_backward<P, T>,
      decode_backward<S, P, T>,
  };
}

}  // namespace

const RowKernelTable& table() {
  static const RowKernelTable kernels{
      make<double, double>(), make<float, float>(), make<Float16, float>(), make<BFloat16, float>(),
      make<BFloat16, BFloat16>(),
  };
  return kernels;
}

}  // namespace ANISO_ISA
}  // namespace aniso
