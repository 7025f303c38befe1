// CPU kernels between the matrix products. Each works on a chunk of rows that fits the cache; the products themselves and
// the threads are the caller's (csrc/torch).
//
// S is the storage format of the tensors that go out, P the format of the rebuilding products and of the chunks that go in,
// T the format of sums (Working<P>) and of the projection: a radius map can be steep, and would enlarge the rounding of
// half-precision coordinates. All chunks are row-major and contiguous. Letters as in the Python package: D width,
// R rank, M = R/2 blocks; R_in and R_out are R or 2R (see aniso_ext/ops/operands.py for the three complements).
#pragma once

#include <cstdint>

#include "aniso/block_math.h"
#include "aniso/storage.h"

namespace aniso {

// Constants of the closed-form initialisation; T arrays of Operands.
template <typename T>
struct Initialisation {
  int32_t width;
  int32_t rank;
  int32_t rank_in;
  int32_t rank_out;
  int32_t pieces;               // K + 1
  int32_t bucket_count;
  T scalar;                     // s_V; read only when rank_out == rank
  const T* input_bias;          // [R_in]
  const T* target_coordinates;  // [R]
  const Segment<T>* segments;   // [M, K + 1]
  const int16_t* buckets;       // [M, bucket_count], knots below each bucket, at most K - window
  const int32_t* windows;       // [M], most knots in one bucket
  const T* scale;               // [D], a scalar complement repeated
  const T* offset;              // [D]
  const T* shift;               // [D] or null
};

template <typename T>
struct Update {
  int32_t width;
  int32_t rank;
  T a_theta;
  T a_rho;
  T a_v;
  bool project;    // take the part of the step in U away again
  const T* shift;  // [D] or null
};

template <typename S, typename P>
struct RowKernels {
  using T = typename Working<P>::type;

  // chunk = rows of any strides, converted.
  void (*load)(const S* source, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, P* chunk);
  void (*load_widened)(const S* source, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T* chunk);

  // projected [n, R_in] = y W_in  ->  coefficients [n, R_out] of the rebuild.
  void (*correct_map)(const Initialisation<T>&, int64_t n, const T* projected, P* coefficients);
  // rebuilt [n, D] = coefficients W_out^T, y [n, D]  ->  out [n, D]. `scratch` holds D values.
  void (*correct_finish)(const Initialisation<T>&, int64_t n, const P* rebuilt, const P* y, T* scratch, S* out);
  // Gradient at the unnormalised row w, from that at the output.
  void (*correct_finish_backward)(
      const Initialisation<T>&, int64_t n, const P* rebuilt, const P* y, const P* grad, T* scratch, P* grad_row);
  // grad_coefficients [n, R_out] -> grad_projected [n, R_in].
  void (*correct_map_backward)(
      const Initialisation<T>&, int64_t n, const T* projected, const P* grad_coefficients, T* grad_projected);
  // grad_y = back-projected [n, D] + scale * grad_row.
  void (*add_scaled)(const Initialisation<T>&, int64_t n, const T* back_projected, const P* grad_row, S* grad_y);

  // Columns [0, 3M) of out [n, 3M + D] and the coefficients of V.
  void (*encode_map)(const Initialisation<T>&, int64_t n, const T* projected, P* coefficients, S* out);
  // Columns [3M, 3M + D) of out.
  void (*encode_finish)(const Initialisation<T>&, int64_t n, const P* rebuilt, const P* y, S* out);
  // grad_polar points at columns [0, 3M) of the gradient, `stride` apart.
  void (*encode_map_backward)(const Initialisation<T>&, int64_t n, const T* projected, const P* grad_polar, int64_t stride,
                              const P* grad_coefficients, T* grad_projected);

  // step [n, D] = a_v tanh(dv).
  void (*decode_step)(const Update<T>&, int64_t n, const P* deltas, P* step);
  // projected_step [n, R] = step Q, or null  ->  coefficients [n, R].
  void (*decode_map)(
      const Update<T>&, int64_t n, const P* state, const P* deltas, const P* projected_step, P* coefficients);
  void (*decode_finish)(
      const Update<T>&, int64_t n, const P* rebuilt, const P* state, const P* step, T* scratch, S* out);
  void (*decode_finish_backward)(const Update<T>&, int64_t n, const P* rebuilt, const P* state, const P* step,
                                 const P* grad, T* scratch, P* grad_row);
  // grad_coefficients [n, R] = grad_row Q; leak [n, D] = grad_coefficients Q^T, or null.
  void (*decode_backward)(const Update<T>&, int64_t n, const P* state, const P* deltas, const P* grad_coefficients,
                          const P* grad_row, const P* leak, S* grad_state, S* grad_deltas);
};

// The kernels for the best instruction set of this processor. Defined for (double, double), (float, float),
// (Float16, float), (BFloat16, float) and (BFloat16, BFloat16).
template <typename S, typename P>
const RowKernels<S, P>& row_kernels();

// Name of the instruction set that row_kernels() chose: "avx512", "avx2" or "baseline". The environment variable
// ANISO_CPU_ISA lowers the choice.
const char* instruction_set();

// Whether the processor multiplies bfloat16 natively (AVX512-BF16 or AMX).
bool has_bfloat16_products();

}  // namespace aniso
