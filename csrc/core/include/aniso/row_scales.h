// The two norms of an output row, for CPU and GPU kernels alike.
//
//   n = max(|w|, floor)   e' = w/n   h = e' + g   e = h/|h|        g = shift = m_t - m_hat; without g, e = e'
//
// |h|^2 = |w|^2/n^2 + 2 w.g/n + |g|^2 needs no second look at the row. Its relative error is at most
// 3 eps (1 + |g|)^2/|h|^2: harmless unless the calibration nearly cancels the row.
#pragma once

#include <cmath>

#include "aniso/block_math.h"
#include "aniso/config.h"

namespace aniso {

template <typename T>
struct RowScales {
  T inverse;         // 1/n
  T outer;           // 1/|h|, 1 without a shift
  T unit_squared;    // |e'|^2
  T unit_dot_shift;  // e'.g
};

// From |w|^2, w.g and |g|^2.
template <typename T>
ANISO_INLINE RowScales<T> row_scales(T squares, T dot_shift, T shift_squares, bool shifted) {
  const T norm = std::sqrt(squares);
  RowScales<T> s;
  s.inverse = T(1) / (norm < T(kNormFloor) ? T(kNormFloor) : norm);
  s.unit_squared = squares * s.inverse * s.inverse;
  s.unit_dot_shift = dot_shift * s.inverse;
  s.outer = T(1);
  if (shifted) {
    const T length = std::sqrt(s.unit_squared + T(2) * s.unit_dot_shift + shift_squares);
    s.outer = T(1) / (length < T(kNormFloor) ? T(kNormFloor) : length);
  }
  return s;
}

}  // namespace aniso
