// Rows normalised, calibrated and normalised again (aniso/row_scales.h), and the gradient of that; included once per
// instruction set. A row is written once: its two norms come from sums of the first pass.

template <typename T>
ANISO_INLINE T dot(const T* a, const T* b, int32_t length) {
  T sum = T(0);
  ANISO_SIMD_SUM(sum)
  for (int32_t j = 0; j < length; ++j) sum += a[j] * b[j];
  return sum;
}

// w is a functor j -> w_j; the row is kept in scratch between the passes.
template <bool kShift, typename S, typename T, typename Row>
ANISO_INLINE void finish_row(const Row& w, int32_t width, const T* shift, T shift_squares, T* scratch, S* out) {
  T squares = T(0), dot_shift = T(0);
  ANISO_SIMD_SUM(squares, dot_shift)
  for (int32_t j = 0; j < width; ++j) {
    const T value = w(j);
    scratch[j] = value;
    squares += value * value;
    if (kShift) dot_shift += value * shift[j];
  }
  const RowScales<T> s = row_scales(squares, dot_shift, shift_squares, kShift);
  const T row_factor = s.inverse * s.outer;
  ANISO_SIMD
  for (int32_t j = 0; j < width; ++j) {
    const T value = kShift ? scratch[j] * row_factor + shift[j] * s.outer : scratch[j] * row_factor;
    out[j] = narrow<S>(value);
  }
}

template <bool kShift, typename P, typename T, typename Row>
ANISO_INLINE void finish_row_backward(
    const Row& w, int32_t width, const T* shift, T shift_squares, const P* grad, T* scratch, P* grad_row) {
  T squares = T(0), dot_shift = T(0), dot_grad = T(0), grad_shift = T(0);
  ANISO_SIMD_SUM(squares, dot_shift, dot_grad, grad_shift)
  for (int32_t j = 0; j < width; ++j) {
    const T value = w(j), g = widen(grad[j]);
    scratch[j] = value;
    squares += value * value;
    dot_grad += value * g;
    if (kShift) {
      dot_shift += value * shift[j];
      grad_shift += g * shift[j];
    }
  }
  const RowScales<T> s = row_scales(squares, dot_shift, shift_squares, kShift);
  const RowGradient<T> factors = row_gradient(s, dot_grad, grad_shift, kShift);
  ANISO_SIMD
  for (int32_t j = 0; j < width; ++j) {
    T value = widen(grad[j]) * factors.grad - scratch[j] * factors.row;
    if (kShift) value -= shift[j] * factors.shift;
    grad_row[j] = narrow<P>(value);
  }
}

// All rows of a chunk; row(i) gives the functor of row i. The choice of a shift is made once per row, outside its loops.
template <typename S, typename T, typename MakeRow>
ANISO_INLINE void finish_rows(
    const MakeRow& row, int64_t n, int32_t width, const T* shift, T* scratch, S* out) {
  const T shift_squares = shift ? dot(shift, shift, width) : T(0);
  for (int64_t i = 0; i < n; ++i) {
    if (shift) {
      finish_row<true>(row(i), width, shift, shift_squares, scratch, out + i * width);
    } else {
      finish_row<false>(row(i), width, shift, shift_squares, scratch, out + i * width);
    }
  }
}

template <typename P, typename T, typename MakeRow>
ANISO_INLINE void finish_rows_backward(
    const MakeRow& row, int64_t n, int32_t width, const T* shift, const P* grad, T* scratch, P* grad_row) {
  const T shift_squares = shift ? dot(shift, shift, width) : T(0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * width;
    if (shift) {
      finish_row_backward<true>(row(i), width, shift, shift_squares, grad + at, scratch, grad_row + at);
    } else {
      finish_row_backward<false>(row(i), width, shift, shift_squares, grad + at, scratch, grad_row + at);
    }
  }
}
