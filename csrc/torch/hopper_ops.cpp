// The Hopper kernels: check -> parameters -> launch on the current stream of the rows' device. Operators of their own, because
// they read other constants (aniso_ext/ops/hopper.py).
#include "hopper_ops.h"

#include "aniso/cuda_sm90.h"
#include "cuda_arguments.h"

namespace aniso_torch {
namespace {

// The stride of a single row may be anything.
int64_t row_stride(const Tensor& y) { return y.size(0) > 1 ? y.stride(0) : y.size(1); }

// Rows as the copy engine wants them; anything else is copied.
Tensor aligned_rows(const Tensor& y) {
  constexpr int64_t kBytes = 16;
  const bool aligned = reinterpret_cast<uintptr_t>(y.const_data_ptr()) % kBytes == 0;
  const int64_t elements = kBytes / int64_t(y.element_size());
  if (aligned && y.stride(1) == 1 && row_stride(y) % elements == 0 && row_stride(y) >= y.size(1)) return y;
  return y.is_contiguous() ? torch::stable::clone(y) : torch::stable::contiguous(y);
}

// together: how many elements of a row are loaded at a time.
void check_width(int64_t width, int64_t together = 8, int64_t most = aniso::kSm90Width) {
  check(width >= together && width <= most && width % together == 0, "no Hopper kernel for width ", width);
}

// The copy engine counts rows in 32 bits.
void check_count(const Tensor& rows) {
  check(rows.size(0) <= std::numeric_limits<int32_t>::max() - 256, "too many rows for one launch: ", rows.size(0));
}

// S: of the factors of products. may_stream: whether the operation has a kernel for bases that stream.
template <typename S>
aniso::Sm90Operands<S> checked_hopper_operands(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in,
                                               bool may_stream = false) {
  check(in.output_weight.dim() == 2, "output_weight must be a matrix");
  const int64_t width = in.output_weight.size(0), rank = in.target_coordinates.numel();
  const bool half = y.scalar_type() != ScalarType::Float;
  const ScalarType product = half ? y.scalar_type() : ScalarType::Half;
  check_width(width, half ? 8 : 4, may_stream ? aniso::kSm90StreamWidth : aniso::kSm90Width);
  check(rank >= 2 && rank % 2 == 0 && rank <= (may_stream ? aniso::kSm90StreamRank : aniso::kSm90Rank), "no Hopper kernel for rank ", rank);
  const int64_t columns = aniso::sm90_columns(int32_t(rank));
  check_count(y);
  check_rows(y, "y", y, width);
  const bool diagonal = in.scale.numel() != 1;
  const int64_t cells = hopper.cells.dim() == 2 ? hopper.cells.size(1) : 0;
  check(cells >= 2, "cells must be [", columns / 2, ", cells + 1]");
  const int64_t pieces = in.segments.dim() == 3 ? in.segments.size(1) : 0;
  const int64_t bucket_count = in.buckets.dim() == 2 ? in.buckets.size(1) : 0;
  check(pieces >= 3 && pieces <= kLargestSize, "segments must be [M, K + 1, 3] with K of at least 2");
  check(bucket_count >= 1 && bucket_count <= kLargestSize, "buckets must be [M, buckets]");
  check_constant(in.segments, "segments", y, ScalarType::Float, rank / 2 * 3 * pieces);
  check_constant(in.buckets, "buckets", y, ScalarType::Short, rank / 2 * bucket_count);
  check_constant(in.windows, "windows", y, ScalarType::Int, rank / 2);
  check_constant(hopper.basis, "basis", y, product, width * columns);
  check_constant(hopper.shuffled, "shuffled", y, product, aniso::sm90_padded(int32_t(width)) * columns);
  check_constant(hopper.coordinates, "coordinates", y, ScalarType::Float, 3 * rank);
  check_constant(in.target_coordinates, "target_coordinates", y, ScalarType::Float, rank);
  check_constant(hopper.cells, "cells", y, ScalarType::Int, columns / 2 * cells);
  check_constant(hopper.map_scales, "map_scales", y, ScalarType::Float, 3 * columns / 2);
  check_constant(in.scale, "scale", y, ScalarType::Float, diagonal ? width : 1);
  check_constant(in.offset, "offset", y, ScalarType::Float, width);
  if (in.shift) check_constant(*in.shift, "shift", y, ScalarType::Float, width);
  const float* coordinates = data<float>(hopper.coordinates);
  return {int32_t(width),
          int32_t(rank),
          int32_t(cells - 1),
          diagonal,
          data<S>(hopper.basis),
          data<S>(hopper.shuffled),
          coordinates,
          data<float>(in.target_coordinates),
          coordinates + rank,
          coordinates + 2 * rank,
          reinterpret_cast<const uint32_t*>(data<int32_t>(hopper.cells)),
          data<float>(hopper.map_scales),
          int32_t(pieces),
          int32_t(bucket_count),
          reinterpret_cast<const aniso::Segment<float>*>(data<float>(in.segments)),
          data<int16_t>(in.buckets),
          data<int32_t>(in.windows),
          data<float>(in.scale),
          data<float>(in.offset),
          in.shift ? data<float>(*in.shift) : nullptr};
}

template <typename S>
aniso::Sm90Update<S> checked_hopper_update(const Tensor& state, const Tensor& deltas, const Tensor& shuffled, const UpdateArguments& in) {
  check(in.basis.dim() == 2, "basis must be a matrix");
  const int64_t width = in.basis.size(0), rank = in.basis.size(1);
  check_width(width);
  check(rank >= 16 && rank % 16 == 0 && rank <= aniso::kSm90Rank, "no Hopper kernel of decode for rank ", rank);
  check_count(state);
  check_rows(state, "state", state, rank / 2 * 3 + width);
  check_rows(deltas, "deltas", state, rank + width);
  check_constant(shuffled, "shuffled", state, state.scalar_type(), int64_t(aniso::sm90_padded(int32_t(width))) * aniso::kSm90Rank);
  if (in.shift) check_constant(*in.shift, "shift", state, ScalarType::Float, width);
  return {int32_t(width),  int32_t(rank), float(in.a_theta), float(in.a_rho),
          float(in.a_v),   in.project,    data<S>(shuffled), in.shift ? data<float>(*in.shift) : nullptr};
}

void check_hopper() { check(aniso::sm90_present(), "the Hopper kernels need a GPU of compute capability 9.0"); }

// Calls run(S{}) for half-precision rows on a Hopper GPU.
template <typename Run>
void dispatch_half(const Tensor& y, const Run& run) {
  check_hopper();
  if (y.scalar_type() == ScalarType::BFloat16) return run(aniso::BFloat16{});
  check(y.scalar_type() == ScalarType::Half, "the Hopper kernels are for bfloat16 and float16 rows");
  run(aniso::Float16{});
}

template <typename S>
aniso::Sm90Rows<S> hopper_rows(const Tensor& y) {
  return {data<S>(y), y.size(0), row_stride(y)};
}

}  // namespace

Tensor hopper_correct(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in) {
  check(y.is_cuda() && y.dim() == 2, "y must be a CUDA matrix");
  const DeviceGuard guard(y.get_device_index());
  Tensor out = torch::stable::new_empty(y, {y.size(0), y.size(1)});
  const auto run = [&](auto storage, auto product) {
    using S = decltype(storage);
    const auto operands = checked_hopper_operands<decltype(product)>(y, hopper, in, std::is_same_v<S, decltype(product)>);
    const Tensor rows = aligned_rows(y);
    check_launch(aniso::sm90_correct(operands, hopper_rows<S>(rows), mutable_data<S>(out), stream_of(y)), "hopper_correct");
  };
  if (y.scalar_type() == ScalarType::Float) {
    check_hopper();
    run(float{}, aniso::Float16{});
  } else {
    dispatch_half(y, [&](auto storage) { run(storage, storage); });
  }
  return out;
}

Tensor hopper_correct_sums(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in) {
  check(y.is_cuda() && y.dim() == 2, "y must be a CUDA matrix");
  const DeviceGuard guard(y.get_device_index());
  Tensor sums = torch::stable::new_zeros(y, {y.size(1)}, ScalarType::Double);
  dispatch_half(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_hopper_operands<S>(y, hopper, in);
    if (y.size(0) == 0) return;
    const Tensor rows = aligned_rows(y);
    const int64_t slots = aniso::sm90_sum_slots(operands.width);
    Tensor parts = torch::stable::new_empty(y, {slots, y.size(1) + aniso::kSm90SumColumns}, ScalarType::Float);
    check_launch(aniso::sm90_correct_sums(operands, hopper_rows<S>(rows), mutable_data<float>(parts), mutable_data<double>(sums),
                                          stream_of(y)),
                 "hopper_correct_sums");
  });
  return sums;
}

Tensor hopper_encode(const Tensor& y, const HopperTensors& hopper, const InitialisationTensors& in) {
  check(y.is_cuda() && y.dim() == 2, "y must be a CUDA matrix");
  const DeviceGuard guard(y.get_device_index());
  Tensor state;
  dispatch_half(y, [&](auto storage) {
    using S = decltype(storage);
    const auto operands = checked_hopper_operands<S>(y, hopper, in);
    check(operands.rank % 16 == 0, "hopper_encode needs a rank that is a multiple of 16, got ", operands.rank);
    const Tensor rows = aligned_rows(y);
    state = torch::stable::new_empty(y, {y.size(0), int64_t(operands.rank) / 2 * 3 + operands.width});
    check_launch(aniso::sm90_encode(operands, hopper_rows<S>(rows), mutable_data<S>(state), stream_of(y)), "hopper_encode");
  });
  return state;
}

Tensor hopper_decode(const Tensor& state, const Tensor& deltas, const Tensor& shuffled, const UpdateArguments& in) {
  check(state.is_cuda() && state.dim() == 2, "state must be a CUDA matrix");
  const DeviceGuard guard(state.get_device_index());
  Tensor out;
  dispatch_half(state, [&](auto storage) {
    using S = decltype(storage);
    const auto update = checked_hopper_update<S>(state, deltas, shuffled, in);
    out = torch::stable::new_empty(state, {state.size(0), update.width});
    const Tensor states = aligned_rows(state), moves = aligned_rows(deltas);
    check_launch(aniso::sm90_decode(update, hopper_rows<S>(states), hopper_rows<S>(moves), mutable_data<S>(out), stream_of(state)),
                 "hopper_decode");
  });
  return out;
}

std::tuple<Tensor, Tensor> hopper_decode_backward(const Tensor& grad, const Tensor& state, const Tensor& deltas, const Tensor& shuffled,
                                                  const UpdateArguments& in) {
  check(state.is_cuda() && state.dim() == 2, "state must be a CUDA matrix");
  const DeviceGuard guard(state.get_device_index());
  Tensor grad_state = torch::stable::new_empty(state, {state.size(0), state.size(1)});
  Tensor grad_deltas = torch::stable::new_empty(deltas, {deltas.size(0), deltas.size(1)});
  dispatch_half(state, [&](auto storage) {
    using S = decltype(storage);
    const auto update = checked_hopper_update<S>(state, deltas, shuffled, in);
    check_rows(grad, "grad", state, update.width);
    const Tensor grads = aligned_rows(grad), states = aligned_rows(state), moves = aligned_rows(deltas);
    check_launch(aniso::sm90_decode_backward(update, hopper_rows<S>(grads), hopper_rows<S>(states), hopper_rows<S>(moves),
                                             mutable_data<S>(grad_state), mutable_data<S>(grad_deltas), stream_of(state)),
                 "hopper_decode_backward");
  });
  return {grad_state, grad_deltas};
}

}  // namespace aniso_torch
