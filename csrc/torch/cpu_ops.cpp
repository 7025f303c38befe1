// CPU operators: check -> parameters -> chunks of rows, each projected, mapped, rebuilt and finished while it is in cache.
#include "cpu_ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "aniso/row_kernels.h"
#include "checks.h"
#include "products.h"

namespace aniso_torch {
namespace {

using aniso::BFloat16;
using aniso::Float16;
using aniso::RowKernels;
using aniso::Working;

// Large enough for the products to run near their peak, small enough for the chunks between them to stay in cache.
template <typename P>
constexpr int64_t kChunkRows = sizeof(P) == 2 ? 512 : 256;

// Does not depend on the number of threads, so that results do not either; 16 threads share a batch of 512 rows.
template <typename P>
int64_t chunk_rows(int64_t rows) {
  return std::clamp<int64_t>(rows / 16 / 32 * 32, 32, kChunkRows<P>);
}

// Memory that keeps its size from chunk to chunk and is not cleared.
template <typename T>
class Buffer {
 public:
  T* sized(int64_t elements) {
    if (elements > capacity_) {
      memory_.reset(new T[size_t(elements)]);
      capacity_ = elements;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t capacity_ = 0;
};

// What one thread works in.
template <typename P>
struct Workspace {
  Buffer<P> rows, grad, coefficients, grad_row, deltas, step;
  Buffer<typename Working<P>::type> scratch;
};

// body(first row, rows, workspace) over chunks, on all threads. A single chunk stays on the caller's thread, where the
// products may use every thread themselves.
template <typename P, typename Body>
void for_each_chunk(int64_t rows, const Body& body) {
  const int64_t size = chunk_rows<P>(rows);
  torch::stable::parallel_for(0, (rows + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    Workspace<P> work;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk * size, std::min(size, rows - chunk * size), work);
    }
  });
}

void check_matrix(const Tensor& tensor, const char* name, int64_t columns) {
  check(tensor.dim() == 2 && tensor.size(1) == columns, name, " must be [N, ", columns, "]");
}

void check_constant(const Tensor& tensor, const char* name, ScalarType dtype, int64_t elements) {
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == elements, name,
                  " must be contiguous, of the expected dtype, and hold ", elements, " values");
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of a tensor as a contiguous chunk in the products' format: in place where they already are one.
template <typename S, typename P>
class Chunks {
 public:
  explicit Chunks(const Tensor& tensor)
      : source_(data<S>(tensor)), columns_(tensor.size(1)), row_stride_(tensor.stride(0)), column_stride_(tensor.stride(1)) {}

  const P* rows(int64_t first, int64_t n, Buffer<P>& buffer) const {
    const S* source = source_ + first * row_stride_;
    if constexpr (std::is_same_v<S, P>) {
      if (column_stride_ == 1 && row_stride_ == columns_) return source;
    }
    P* chunk = buffer.sized(n * columns_);
    aniso::row_kernels<S, P>().load(source, row_stride_, column_stride_, n, columns_, chunk);
    return chunk;
  }

 private:
  const S* source_;
  int64_t columns_, row_stride_, column_stride_;
};

template <typename T>
constexpr ScalarType working_dtype() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

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
    check(in.input_weight.scalar_type() == in.output_weight.scalar_type(), "the weights differ in dtype");
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
    const Tensor projected = project(rows, n);
    kernels.correct_map(init, n, data<P>(projected), coefficients);
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
    P* coefficients = work.coefficients.sized(n * std::max(init.rank_in, init.rank_out));
    P* grad_row = work.grad_row.sized(n * init.width);
    const Tensor projected = project(rows, n);
    kernels.correct_map(init, n, data<P>(projected), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.correct_finish_backward(init, n, data<P>(rebuilt), rows, grads.rows(first, n, work.grad),
                                    work.scratch.sized(init.width), grad_row);
    const Tensor grad_coefficients = gather(grad_row, n);
    kernels.correct_map_backward(init, n, data<P>(projected), data<P>(grad_coefficients), coefficients);
    const Tensor back_projected = spread(coefficients, n);
    kernels.add_scaled(init, n, data<P>(back_projected), grad_row, result + first * init.width);
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
    const Tensor projected = project(rows, n);
    kernels.encode_map(init, n, data<P>(projected), coefficients, state);
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
    const Tensor projected = project(chunks.rows(first, n, work.rows), n);
    const P* grad_state = grads.rows(first, n, work.grad);
    P* grad_v0 = work.grad_row.sized(n * init.width);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(grad_state + i * columns + polar_columns, init.width, grad_v0 + i * init.width);
    }
    const Tensor grad_coefficients = gather(grad_v0, n);
    P* grad_projected = work.coefficients.sized(n * init.rank_in);
    kernels.encode_map_backward(
        init, n, data<P>(projected), grad_state, columns, data<P>(grad_coefficients), grad_projected);
    const Tensor back_projected = spread(grad_projected, n);
    kernels.add_scaled(init, n, data<P>(back_projected), grad_v0, result + first * init.width);
  });
}

template <typename P>
aniso::Update<typename Working<P>::type> checked_update(const UpdateArguments& in, const Tensor& state, const Tensor& deltas) {
  using T = typename Working<P>::type;
  const int64_t width = in.basis.size(0), rank = in.basis.size(1);
  check(rank >= 2 && rank % 2 == 0, "the rank must be even and at least 2, got ", rank);
  check_matrix(state, "state", rank / 2 * 3 + width);
  check_matrix(deltas, "deltas", rank + width);
  check(state.size(0) == deltas.size(0), "state and deltas differ in rows");
  check(state.scalar_type() == deltas.scalar_type(), "state and deltas differ in dtype");
  if (in.shift) check_constant(*in.shift, "shift", working_dtype<T>(), width);
  return {int32_t(width), int32_t(rank), T(in.a_theta), T(in.a_rho), T(in.a_v), in.project,
          in.shift ? data<T>(*in.shift) : nullptr};
}

Tensor product_if(bool wanted, const Product& product, const void* rows, int64_t n) {
  return wanted ? product(rows, n) : Tensor();
}

template <typename P>
const P* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? data<P>(tensor) : nullptr;
}

template <typename S, typename P>
void run_decode(const Tensor& state, const Tensor& deltas, const UpdateArguments& in, Tensor& out) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const aniso::Update<T> update = checked_update<P>(in, state, deltas);
  const Chunks<S, P> states(state), moves(deltas);
  const int64_t total = state.size(0);
  const Product project(transposed(in.basis), total), rebuild(in.basis, total);
  S* result = mutable_data<S>(out);
  for_each_chunk<P>(total, [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* state_rows = states.rows(first, n, work.rows);
    const P* delta_rows = moves.rows(first, n, work.deltas);
    P* step = work.step.sized(n * update.width);
    P* coefficients = work.coefficients.sized(n * update.rank);
    kernels.decode_step(update, n, delta_rows, step);
    const Tensor leak = product_if(update.project, project, step, n);
    kernels.decode_map(update, n, state_rows, delta_rows, data_or_null<P>(leak), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.decode_finish(update, n, data<P>(rebuilt), state_rows, step, work.scratch.sized(update.width),
                          result + first * update.width);
  });
}

template <typename S, typename P>
void run_decode_backward(const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in,
                         Tensor& grad_state, Tensor& grad_deltas) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = aniso::row_kernels<S, P>();
  const aniso::Update<T> update = checked_update<P>(in, state, deltas);
  const Chunks<S, P> states(state), moves(deltas), grads(grad);
  const int64_t total = state.size(0);
  const Product project(transposed(in.basis), total), rebuild(in.basis, total);
  S *state_result = mutable_data<S>(grad_state), *delta_result = mutable_data<S>(grad_deltas);
  for_each_chunk<P>(total, [&](int64_t first, int64_t n, Workspace<P>& work) {
    const P* state_rows = states.rows(first, n, work.rows);
    const P* delta_rows = moves.rows(first, n, work.deltas);
    P* step = work.step.sized(n * update.width);
    P* coefficients = work.coefficients.sized(n * update.rank);
    P* grad_row = work.grad_row.sized(n * update.width);
    kernels.decode_step(update, n, delta_rows, step);
    const Tensor step_leak = product_if(update.project, project, step, n);
    kernels.decode_map(update, n, state_rows, delta_rows, data_or_null<P>(step_leak), coefficients);
    const Tensor rebuilt = rebuild(coefficients, n);
    kernels.decode_finish_backward(update, n, data<P>(rebuilt), state_rows, step, grads.rows(first, n, work.grad),
                                   work.scratch.sized(update.width), grad_row);
    const Tensor grad_coefficients = project(grad_row, n);
    const Tensor leak = product_if(update.project, rebuild, data<P>(grad_coefficients), n);
    kernels.decode_backward(update, n, state_rows, delta_rows, data<P>(grad_coefficients), grad_row,
                            data_or_null<P>(leak), state_result + first * state.size(1),
                            delta_result + first * deltas.size(1));
  });
}

// Calls run(S{}, P{}) for the storage dtype of the rows and the dtype of the product weights.
template <typename Run>
void dispatch(const Tensor& rows, const Tensor& weight, const Run& run) {
  const ScalarType storage = rows.scalar_type(), product = weight.scalar_type();
  if (storage == ScalarType::Double && product == ScalarType::Double) {
    run(double{}, double{});
  } else if (storage == ScalarType::Float && product == ScalarType::Float) {
    run(float{}, float{});
  } else if (storage == ScalarType::Half && product == ScalarType::Float) {
    run(Float16{}, float{});
  } else if (storage == ScalarType::BFloat16 && product == ScalarType::Float) {
    run(BFloat16{}, float{});
  } else if (storage == ScalarType::BFloat16 && product == ScalarType::BFloat16) {
    run(BFloat16{}, BFloat16{});
  } else {
    check(false, "no CPU kernel for this pair of row and weight dtypes");
  }
}

// A large result comes from fresh pages. Faulting them in one by one costs as much as computing them, so ask for large ones.
void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLargePage = int64_t(1) << 21;
  const intptr_t first = (reinterpret_cast<intptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const intptr_t last = (reinterpret_cast<intptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (last - first >= 4 * kLargePage) madvise(reinterpret_cast<void*>(first), size_t(last - first), MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

Tensor empty_rows(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor result = torch::stable::new_empty(like, {rows, columns});
  prefer_large_pages(result.mutable_data_ptr(), rows * columns * int64_t(result.element_size()));
  return result;
}

void check_grad(const Tensor& grad, const Tensor& rows, int64_t columns) {
  check_matrix(grad, "grad", columns);
  check(grad.size(0) == rows.size(0), "grad differs from the rows in length");
  check(grad.scalar_type() == rows.scalar_type(), "grad differs from the rows in dtype");
}

}  // namespace

Tensor correct(const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  Tensor out = empty_rows(y, y.size(0), y.size(1));
  dispatch(y, in.input_weight, [&](auto s, auto p) { run_correct<decltype(s), decltype(p)>(y, in, out); });
  return out;
}

Tensor correct_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  check_grad(grad, y, y.size(1));
  Tensor out = empty_rows(y, y.size(0), y.size(1));
  dispatch(y, in.input_weight, [&](auto s, auto p) { run_correct_backward<decltype(s), decltype(p)>(grad, y, in, out); });
  return out;
}

Tensor encode(const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  Tensor out = empty_rows(y, y.size(0), in.target_coordinates.numel() / 2 * 3 + y.size(1));
  dispatch(y, in.input_weight, [&](auto s, auto p) { run_encode<decltype(s), decltype(p)>(y, in, out); });
  return out;
}

Tensor encode_backward(const Tensor& grad, const Tensor& y, const InitialisationTensors& in) {
  check_matrix(y, "y", in.output_weight.size(0));
  check_grad(grad, y, in.target_coordinates.numel() / 2 * 3 + y.size(1));
  Tensor out = empty_rows(y, y.size(0), y.size(1));
  dispatch(y, in.input_weight, [&](auto s, auto p) { run_encode_backward<decltype(s), decltype(p)>(grad, y, in, out); });
  return out;
}

Tensor decode(const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  Tensor out = empty_rows(state, state.size(0), in.basis.size(0));
  dispatch(state, in.basis, [&](auto s, auto p) { run_decode<decltype(s), decltype(p)>(state, deltas, in, out); });
  return out;
}

std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad, const Tensor& state, const Tensor& deltas, const UpdateArguments& in) {
  check_grad(grad, state, in.basis.size(0));
  Tensor grad_state = empty_rows(state, state.size(0), state.size(1));
  Tensor grad_deltas = empty_rows(deltas, deltas.size(0), deltas.size(1));
  dispatch(state, in.basis, [&](auto s, auto p) {
    run_decode_backward<decltype(s), decltype(p)>(grad, state, deltas, in, grad_state, grad_deltas);
  });
  return {grad_state, grad_deltas};
}

}  // namespace aniso_torch
