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

// Gradient at w from that at e:  grad_w = grad * grad_e - row * w - shift * g.
template <typename T>
struct RowGradient {
  T grad;
  T row;
  T shift;
};

// From the scales of the row, w.grad_e and grad_e.g.
template <typename T>
ANISO_INLINE RowGradient<T> row_gradient(const RowScales<T>& s, T dot_grad, T grad_shift, bool shifted) {
  const T unit_dot_grad = dot_grad * s.inverse;
  // Gradient at e' is outer * grad - radial * h; at w it loses its part along e' as well.
  const T radial = shifted ? (unit_dot_grad + grad_shift) * s.outer * s.outer * s.outer : T(0);
  const T along = s.outer * unit_dot_grad - radial * (s.unit_squared + s.unit_dot_shift);
  return {s.inverse * s.outer, s.inverse * s.inverse * (radial + along), s.inverse * radial};
}

}  // namespace aniso
