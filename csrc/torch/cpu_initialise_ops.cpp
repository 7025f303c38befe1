// `correct` and `encode` on the CPU: check -> parameters -> chunks of rows, each projected, mapped, rebuilt and finished.
#include "cpu_ops.h"

#include <vector>

#include "cpu_chunks.h"

namespace aniso_torch {
namespace {

using aniso::RowKernels;

// Operands of `correct` and `encode`, checked; the products point at what they need for their direction.
template <typename P>
struct Constants {
  using T = typename Working<P>::type;
  aniso::Initialisation<T> init;
  std::vector<T> scale;  // a scalar complement repeated D times, so that one loop serves both

  Constants(const InitialisationTensors& in, int64_t width) {
    const int64_t rank = in.target_coordinates.numel(), rank_in = in.input_weight.size(0);
    const int64_t rank_out = in.output_weight.size(1), pieces = in.segments.dim() == 3 ? in.segments.size(1) : 0;
    const ScalarType dtype = working_dtype<T>();
    check(rank >= 2 && rank % 2 == 0, "the rank must be even and at least 2, got ", rank);
    check(rank_in == rank || rank_in == 2 * rank, "input_weight must have R or 2R rows");
    check(rank_out == rank || rank_out == 2 * rank, "output_weight must have R or 2R columns");
    check(rank_in == rank || rank_out == 2 * rank, "2R rows of input_weight need 2R columns of output_weight");
    check(in.input_weight.size(1) == width && in.output_weight.size(0) == width,
          "the weights do not have the width of the rows, ", width);
    check(in.input_weight.scalar_type() == dtype, "input_weight must have the dtype of the sums");
    check(pieces >= 3, "segments must be [M, K + 1, 3] with K of at least 2");
    check_constant(in.input_bias, "input_bias", dtype, rank_in);
    check_constant(in.target_coordinates, "target_coordinates", dtype, rank);
    check_constant(in.segments, "segments", dtype, rank / 2 * 3 * pieces);
    const int64_t bucket_count = in.buckets.numel() / (rank / 2);
    check_constant(in.buckets, "buckets", ScalarType::Short, rank / 2 * bucket_count);
    check_constant(in.windows, "windows", ScalarType::Int, rank / 2);
    check_constant(in.offset, "offset", dtype, width);
    check_constant(in.scale, "scale", dtype, in.scale.numel() == 1 ? 1 : width);
    if (in.shift) check_constant(*in.shift, "shift", dtype, width);
    const T* scales = data<T>(in.scale);
    scale.assign(scales, scales + in.scale.numel());
    scale.resize(size_t(width), scales[0]);
    init = {int32_t(width),
            int32_t(rank),
            int32_t(rank_in),
            int32_t(rank_out),
            int32_t(pieces),
            int32_t(bucket_count),
            scales[0],
            data<T>(in.input_bias),
            data<T>(in.target_coordinates),
            reinterpret_cast<const aniso::Segment<T>*>(data<T>(in.segments)),
            data<int16_t>(in.buckets),
            data<int32_t>(in.windows),
            scale.data(),
            data<T>(in.offset),
            in.shift ? data<T>(*in.shift) : nullptr};
  }
};

template <typename S, typename P>
void run_correct(const Tensor& y, const InitialisationTensors& in, Tensor& out) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const Constants<P> constants(in, y.size(1));
  const aniso::Initialisation<T>& init = constants.init;
  const Chunks<S, P> chunks(y);
  const Product project(in.input_weight, y.size(0)), rebuild(in.output_weight, y.size(0));
  S* result = mutable_data<S>(out);
  for_each_chunk<P>(y.size(0), [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* rows = chunks.rows(first, n, work.rows);
    P* coefficients = work.coefficients.sized(n * init.rank_out);
    const Tensor projected = project(chunks.widened(first, n, work), n);
    kernels.correct_map(init, n, data<T>(projected), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.correct_finish(
        init, n, data<P>(rebuilt), rows, work.scratch.sized(init.width), result + first * init.width);
  });
}

template <typename S, typename P>
void run_correct_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in, Tensor& out) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const Constants<P> constants(in, y.size(1));
  const aniso::Initialisation<T>& init = constants.init;
  const Chunks<S, P> chunks(y), grads(grad);
  const int64_t total = y.size(0);
  const Product project(in.input_weight, total), rebuild(in.output_weight, total);
  const Product gather(transposed(in.output_weight), total), spread(transposed(in.input_weight), total);
  S* result = mutable_data<S>(out);
  for_each_chunk<P>(total, [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* rows = chunks.rows(first, n, work.rows);
    P* coefficients = work.coefficients.sized(n * init.rank_out);
    T* grad_projected = work.grad_projected.sized(n * init.rank_in);
    P* grad_row = work.grad_row.sized(n * init.width);
    const Tensor projected = project(chunks.widened(first, n, work), n);
    kernels.correct_map(init, n, data<T>(projected), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.correct_finish_backward(init, n, data<P>(rebuilt), rows, grads.rows(first, n, work.grad),
                                    work.scratch.sized(init.width), grad_row);
    const Tensor grad_coefficients = gather(grad_row, n);
    kernels.correct_map_backward(init, n, data<T>(projected), data<P>(grad_coefficients), grad_projected);
    const Tensor back_projected = spread(grad_projected, n);
    kernels.add_scaled(init, n, data<T>(back_projected), grad_row, result + first * init.width);
  });
}

template <typename S, typename P>
void run_encode(const Tensor& y, const InitialisationTensors& in, Tensor& out) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const Constants<P> constants(in, y.size(1));
  const aniso::Initialisation<T>& init = constants.init;
  const Chunks<S, P> chunks(y);
  const Product project(in.input_weight, y.size(0)), rebuild(in.output_weight, y.size(0));
  S* result = mutable_data<S>(out);
  for_each_chunk<P>(y.size(0), [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* rows = chunks.rows(first, n, work.rows);
    P* coefficients = work.coefficients.sized(n * init.rank_out);
    S* state = result + first * out.size(1);
    const Tensor projected = project(chunks.widened(first, n, work), n);
    kernels.encode_map(init, n, data<T>(projected), coefficients, state);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.encode_finish(init, n, data<P>(rebuilt), rows, state);
  });
}

template <typename S, typename P>
void run_encode_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in, Tensor& out) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const Constants<P> constants(in, y.size(1));
  const aniso::Initialisation<T>& init = constants.init;
  const int64_t total = y.size(0), polar_columns = init.rank / 2 * 3, columns = polar_columns + init.width;
  const Chunks<S, P> chunks(y), grads(grad);
  const Product project(in.input_weight, total);
  const Product gather(transposed(in.output_weight), total), spread(transposed(in.input_weight), total);
  S* result = mutable_data<S>(out);
  for_each_chunk<P>(total, [&](int64_t first, int64_t n, Workspace<P>& work) {
    const Tensor projected = project(chunks.widened(first, n, work), n);
    const P* grad_state = grads.rows(first, n, work.grad);
    P* grad_v0 = work.grad_row.sized(n * init.width);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(grad_state + i * columns + polar_columns, init.width, grad_v0 + i * init.width);
    }
    const Tensor grad_coefficients = gather(grad_v0, n);
    T* grad_projected = work.grad_projected.sized(n * init.rank_in);
    kernels.encode_map_backward(
        init, n, data<T>(projected), grad_state, columns, data<P>(grad_coefficients), grad_projected);
    const Tensor back_projected = spread(grad_projected, n);
    kernels.add_scaled(init, n, data<T>(back_projected), grad_v0, result + first * init.width);
  });
}

}  // namespace

void correct_into(const Tensor& y, const InitialisationTensors& in, Tensor& out) {
  check_matrix(y, "y", in.output_weight.size(0));
  check_matrix(out, "out", y.size(1));
  check(out.size(0) == y.size(0), "out differs from the rows in length");
  check(out.scalar_type() == y.scalar_type(), "out differs from the rows in dtype");
  check(out.is_contiguous(), "out must be contiguous");
  dispatch(y, in.output_weight, [&](auto s, auto p) { run_correct<decltype(s), decltype(p)>(y, in, out); });
}

Tensor correct(const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  Tensor out = empty_rows(y, y.size(0), y.size(1));
  correct_into(y, in, out);
  return out;
}

Tensor correct_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  check_grad(grad, y, y.size(1));
  Tensor out = empty_rows(y, y.size(0), y.size(1));
  dispatch(y, in.output_weight, [&](auto s, auto p) { run_correct_backward<decltype(s), decltype(p)>(grad, y, in, out); });
  return out;
}

Tensor encode(const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  Tensor out = empty_rows(y, y.size(0), in.target_coordinates.numel() / 2 * 3 + y.size(1));
  dispatch(y, in.output_weight, [&](auto s, auto p) { run_encode<decltype(s), decltype(p)>(y, in, out); });
  return out;
}

Tensor encode_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  check_grad(grad, y, in.target_coordinates.numel() / 2 * 3 + y.size(1));
  Tensor out = empty_rows(y, y.size(0), y.size(1));
  dispatch(y, in.output_weight, [&](auto s, auto p) { run_encode_backward<decltype(s), decltype(p)>(grad, y, in, out); });
  return out;
}

}  // namespace aniso_torch
