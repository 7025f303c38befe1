// Launches of the Hopper kernels: which shape serves a width, how many clusters run at a time, the maps of the copy engine.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "sm90_correct.cuh"
#include "sm90_correct_backward.cuh"
#include "sm90_decode.cuh"
#include "sm90_decode_backward.cuh"
#include "sm90_encode_backward.cuh"
#include "sm90_forms.cuh"
#include "sm90_maps.h"
#include "sm90_stream.cuh"

namespace aniso::sm90 {

constexpr int32_t kSumLanes = 16;

// sum e' = s sum y/|w| + Q sum k/|w| + offset sum 1/|w|, from the slots of partial: D columns of the first term, then the sums of k/|w|
// and of 1/|w|. In fp64 and always in the same order.
template <typename S>
__global__ void add_parts(const float* partial, int32_t slots, const S* basis, const float* offset, int32_t width, double* sums) {
  __shared__ double lanes[kSumLanes][32], coefficients[kSm90SumColumns];
  const int32_t columns = width + kSm90SumColumns;
  const auto over_slots = [&](int32_t column) {  // for the threads of the first lane
    double sum = 0;
    for (int32_t slot = threadIdx.y; slot < slots && column < columns; slot += kSumLanes) {
      sum += double(partial[int64_t(slot) * columns + column]);
    }
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0) {
      for (int32_t lane = 1; lane < kSumLanes; ++lane) sum += lanes[lane][threadIdx.x];
    }
    __syncthreads();
    return sum;
  };
  for (int32_t first = 0; first < kSm90SumColumns; first += 32) {
    const int32_t index = first + int32_t(threadIdx.x);
    const double sum = over_slots(width + index);
    if (threadIdx.y == 0 && index < kSm90SumColumns) coefficients[index] = sum;
  }
  const int32_t column = blockIdx.x * 32 + threadIdx.x;
  double sum = over_slots(column);
  if (threadIdx.y == 0 && column < width) {
    sum += double(offset[column]) * coefficients[kRank];
    for (int32_t r = 0; r < kRank; ++r) sum += double(widen(basis[int64_t(column) * kRank + r])) * coefficients[r];
    sums[column] = sum;
  }
}

inline cudaLaunchConfig_t configuration(int64_t blocks, uint32_t threads, uint32_t shared_bytes, int32_t cluster_blocks,
                                        cudaLaunchAttribute* cluster, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(uint32_t(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {uint32_t(cluster_blocks), 1, 1};
  config.attrs = cluster;
  config.numAttrs = 1;
  return config;
}

// Readies a kernel for the current device; how many clusters run at a time, each block with `most_bytes` of shared memory.
template <typename Layout, int kCluster, auto kKernel>
cudaError_t prepare(int32_t* resident, uint32_t most_bytes) {
  cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most_bytes));
  if (error != cudaSuccess) return error;
  static std::atomic<int32_t> known{0};  // the same for every device that this kernel runs on
  if (known == 0) {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = configuration(kCluster, Layout::kThreads, most_bytes, kCluster, &cluster, nullptr);
    int count = 0;
    error = cudaOccupancyMaxActiveClusters(&count, kKernel, &config);
    if (error != cudaSuccess) return error;
    known = count;
  }
  *resident = known;
  return *resident > 0 ? cudaSuccess : cudaErrorNotSupported;
}

// A kernel over `count` rows, or one that fills the device whatever their number: its maps of the copy engine, then its arguments.
template <typename Layout, int kCluster, auto kKernel, typename... Parameters>
cudaError_t launch(int64_t count, bool fill, cudaStream_t stream, const Parameters&... parameters) {
  int32_t resident = 0;
  const cudaError_t error = prepare<Layout, kCluster, kKernel>(&resident, Layout::kBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  const int64_t wanted = (tiles + Layout::kWarpgroups - 1) / Layout::kWarpgroups;
  const int64_t clusters = fill ? int64_t(resident) : std::min<int64_t>(wanted, resident);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config =
      configuration(clusters * kCluster, Layout::kThreads, Layout::kBytes, kCluster, &cluster, stream);
  return cudaLaunchKernelEx(&config, kKernel, parameters...);
}

// The maps of an update: of dv, of v0 and of the shuffled basis.
template <typename S>
struct UpdateMaps {
  CUtensorMap moves, complement, basis;

  cudaError_t encode(const Sm90Update<S>& in, const Sm90Rows<S>& state, const Sm90Rows<S>& deltas) {
    cudaError_t error = matrix_map<kChunkColumns>(&moves, deltas.data + in.rank, state.count, in.width, deltas.stride);
    if (error == cudaSuccess) {
      error = matrix_map<kChunkColumns>(&complement, state.data + in.rank / 2 * 3, state.count, in.width, state.stride);
    }
    if (error != cudaSuccess) return error;
    return matrix_map<kPanelColumns>(&basis, in.shuffled, sm90_padded(in.width), kRank, kRank);
  }
};

// The maps of a gradient of the closed form: of y, of the D columns of grad from `first` on, and of the shuffled basis.
template <typename S>
struct GradientMaps {
  CUtensorMap rows, grads, basis;

  cudaError_t encode(const Sm90Operands<S>& in, const Sm90Rows<S>& grad, int32_t first, const Sm90Rows<S>& y) {
    cudaError_t error = matrix_map<kChunkColumns>(&rows, y.data, y.count, in.width, y.stride);
    if (error == cudaSuccess) error = matrix_map<kChunkColumns>(&grads, grad.data + first, grad.count, in.width, grad.stride);
    if (error != cudaSuccess) return error;
    return matrix_map<kPanelColumns>(&basis, in.shuffled, sm90_padded(in.width), kRank, kRank);
  }
};

inline bool serves_update(int32_t width, int32_t rank) {
  return width >= 8 && width <= kSm90Width && width % 8 == 0 && rank >= 16 && rank <= kSm90Rank && rank % 16 == 0;
}

// body(blocks of a cluster, chunks of a block) for the smallest shape that holds the width: few blocks exchange little, but
// sums of more than five chunks do not fit the registers.
template <typename Body>
auto by_width(int32_t width, const Body& body) {
  using std::integral_constant;
  if (width <= 256) return body(integral_constant<int, 2>{}, integral_constant<int, 2>{});
  if (width <= 512) return body(integral_constant<int, 2>{}, integral_constant<int, 4>{});
  if (width <= 768) return body(integral_constant<int, 4>{}, integral_constant<int, 3>{});
  if (width <= 1024) return body(integral_constant<int, 4>{}, integral_constant<int, 4>{});
  return body(integral_constant<int, 4>{}, integral_constant<int, 5>{});
}

// Wider rows of a number S gain more by a round trip less than they lose by passing through shared memory once more.
constexpr int32_t kWidestTeams = 768;

// V: of the rows, of which 16 bytes are loaded at a time.
template <typename S, typename V>
bool serves(const Sm90Operands<S>& in, const Sm90Rows<V>& y) {
  constexpr int32_t kTogether = 16 / int32_t(sizeof(V));
  return in.width >= kTogether && in.width <= kSm90Width && in.width % kTogether == 0 && in.rank >= 2 && in.rank <= kRank && y.count >= 0;
}

template <typename S>
bool streams(const Sm90Operands<S>& in, const Sm90Rows<S>& y) {
  return in.width >= 8 && in.width <= kSm90StreamWidth && in.width % 8 == 0 && in.rank >= 2 && in.rank <= kSm90StreamRank &&
         !in.diagonal && y.count >= 0;
}

template <Form kForm, typename S>
cudaError_t launch_correct(const Sm90Operands<S>& in, const Sm90Rows<S>& y, S* out, cudaStream_t stream) {
  if (y.count == 0) return cudaSuccess;
  CUtensorMap rows_map, basis_map;
  cudaError_t error = matrix_map<kChunkColumns>(&rows_map, y.data, y.count, in.width, y.stride);
  if (error == cudaSuccess) error = matrix_map<kPanelColumns>(&basis_map, in.shuffled, sm90_padded(in.width), kRank, kRank);
  if (error != cudaSuccess) return error;
  return by_width(in.width, [&](auto cluster, auto chunks) {
    return launch<CorrectTeam<S, cluster, chunks, kForm>, cluster, sm90_correct_kernel<S, cluster, chunks, kForm>>(
        y.count, false, stream, rows_map, basis_map, CorrectArguments<S>{in, y.count, out});
  });
}

template <typename S, int kCluster, int kChunks, Result kResult>
cudaError_t launch_forms(const Sm90Operands<S>& in, const Sm90Rows<S>& y, S* out, float* partial, cudaStream_t stream) {
  using Layout = FormsShared<kCluster, kChunks>;
  constexpr auto kernel = sm90_forms_kernel<S, kCluster, kChunks, kResult>;
  CUtensorMap rows_map, basis_map;
  cudaError_t error = matrix_map<kChunkColumns>(&rows_map, y.data, y.count, in.width, y.stride);
  if (error == cudaSuccess) error = matrix_map<kPanelColumns>(&basis_map, in.basis, in.width, kRank, kRank);
  if (error != cudaSuccess) return error;
  // Every warp of the largest grid has its slot of sums to fill.
  return launch<Layout, kCluster, kernel>(y.count, kResult == Result::kSums, stream, rows_map, basis_map,
                                          FormsArguments<S>{in, y.count, out, partial});
}

template <int kColumns, typename S>
cudaError_t launch_stream(const Sm90Operands<S>& in, const Sm90Rows<S>& y, S* out, cudaStream_t stream) {
  using Layout = StreamShared<kColumns>;
  constexpr auto kernel = sm90_stream_kernel<S, kColumns>;
  const int32_t run = Layout::run(in.cell_count);
  if (run == 0) return cudaErrorInvalidValue;
  CUtensorMap rows_map, basis_map, shuffled_map, cells_map;
  cudaError_t error = matrix_map<kChunkColumns>(&rows_map, y.data, y.count, in.width, y.stride);
  if (error == cudaSuccess) error = matrix_map<kChunkColumns>(&basis_map, in.basis, in.width, kColumns, kColumns);
  if (error == cudaSuccess) error = matrix_map<kChunkColumns>(&shuffled_map, in.shuffled, sm90_padded(in.width), kColumns, kColumns);
  constexpr int32_t kLineCells = Layout::kLineBytes / sizeof(float);
  if (error == cudaSuccess) {
    error = matrix_map<kLineCells, false>(&cells_map, reinterpret_cast<const float*>(in.cells),
                                          Layout::kGroups * (in.cell_count + 1) / Layout::kLineUnits, kLineCells, kLineCells);
  }
  int32_t resident = 0;
  if (error == cudaSuccess) error = prepare<Layout, kStreamCluster, kernel>(&resident, Layout::kLimit);
  if (error != cudaSuccess) return error;
  constexpr int64_t kTogether = kStreamCluster * kStreamGroups * kTileRows;
  const int64_t clusters = std::min<int64_t>((y.count + kTogether - 1) / kTogether, resident);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config =
      configuration(clusters * kStreamCluster, Layout::kThreads, Layout::bytes(in.width), kStreamCluster, &cluster, stream);
  return cudaLaunchKernelEx(&config, kernel, rows_map, basis_map, shuffled_map, cells_map,
                            StreamArguments<S>{in, y.count, Layout::stages(in.width), stream_columns(in.width), run, out});
}

template <int kCluster, int kChunks>
int32_t sum_slots() {
  using Layout = FormsShared<kCluster, kChunks>;
  int32_t resident = 0;
  if (prepare<Layout, kCluster, sm90_forms_kernel<BFloat16, kCluster, kChunks, Result::kSums>>(&resident, Layout::kBytes) != cudaSuccess) {
    return 0;
  }
  return resident * Layout::kWarpgroups * kWarps;
}

}  // namespace aniso::sm90

namespace aniso {

template <typename S>
cudaError_t sm90_correct(const Sm90Operands<S>& operands, const Sm90Rows<S>& y, S* out, cudaStream_t stream) {
  if (sm90_streams(operands.width, operands.rank)) {
    if (!sm90::streams(operands, y)) return cudaErrorInvalidValue;
    if (y.count == 0) return cudaSuccess;
    if (sm90_columns(operands.rank) == kSm90Rank) return sm90::launch_stream<kSm90Rank>(operands, y, out, stream);
    return sm90::launch_stream<kSm90StreamRank>(operands, y, out, stream);
  }
  if (!sm90::serves(operands, y)) return cudaErrorInvalidValue;
  if (operands.diagonal) return sm90::launch_correct<sm90::Form::kDiagonal>(operands, y, out, stream);
  if (operands.width > sm90::kWidestTeams) {
    if (y.count == 0) return cudaSuccess;
    if (operands.width <= 1024) return sm90::launch_forms<S, 4, 4, sm90::Result::kRows>(operands, y, out, nullptr, stream);
    return sm90::launch_forms<S, 4, 5, sm90::Result::kRows>(operands, y, out, nullptr, stream);
  }
  return sm90::launch_correct<sm90::Form::kScalar>(operands, y, out, stream);
}

template <typename S>
cudaError_t sm90_encode(const Sm90Operands<S>& operands, const Sm90Rows<S>& y, S* state, cudaStream_t stream) {
  if (!sm90::serves(operands, y) || operands.diagonal || operands.rank % 16 != 0) return cudaErrorInvalidValue;
  return sm90::launch_correct<sm90::Form::kState>(operands, y, state, stream);
}

template <typename S>
cudaError_t sm90_encode_backward(const Sm90Operands<S>& operands, const Sm90Rows<S>& grad, const Sm90Rows<S>& y, S* grad_y,
                                 cudaStream_t stream) {
  if (!sm90::serves(operands, y) || operands.diagonal || operands.rank % 16 != 0 || grad.count != y.count) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  sm90::GradientMaps<S> maps;
  const cudaError_t error = maps.encode(operands, grad, operands.rank / 2 * 3, y);
  if (error != cudaSuccess) return error;
  return sm90::by_width(operands.width, [&](auto cluster, auto chunks) {
    return sm90::launch<sm90::EncodeGradientTeam<S, cluster, chunks>, cluster, sm90::sm90_encode_backward_kernel<S, cluster, chunks>>(
        y.count, false, stream, maps.rows, maps.grads, maps.basis, sm90::EncodeGradientArguments<S>{operands, grad, grad_y});
  });
}

template <typename S>
cudaError_t sm90_correct_backward(const Sm90Operands<S>& operands, const Sm90Rows<S>& grad, const Sm90Rows<S>& y, S* grad_y,
                                  cudaStream_t stream) {
  if (!sm90::serves(operands, y) || operands.diagonal || grad.count != y.count) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  sm90::GradientMaps<S> maps;
  const cudaError_t error = maps.encode(operands, grad, 0, y);
  if (error != cudaSuccess) return error;
  return sm90::by_width(operands.width, [&](auto cluster, auto chunks) {
    return sm90::launch<sm90::CorrectGradientTeam<S, cluster, chunks>, cluster, sm90::sm90_correct_backward_kernel<S, cluster, chunks>>(
        y.count, false, stream, maps.rows, maps.grads, maps.basis, sm90::CorrectGradientArguments<S>{operands, y.count, grad_y});
  });
}

template <typename S>
cudaError_t sm90_correct_sums(const Sm90Operands<S>& operands, const Sm90Rows<S>& y, float* partial, double* sums,
                              cudaStream_t stream) {
  if (!sm90::serves(operands, y) || operands.diagonal) return cudaErrorInvalidValue;
  const cudaError_t error = sm90::by_width(operands.width, [&](auto cluster, auto chunks) {
    return sm90::launch_forms<S, cluster, chunks, sm90::Result::kSums>(operands, y, static_cast<S*>(nullptr), partial, stream);
  });
  if (error != cudaSuccess) return error;
  const dim3 threads(32, sm90::kSumLanes);
  sm90::add_parts<<<(operands.width + 31) / 32, threads, 0, stream>>>(partial, sm90_sum_slots(operands.width), operands.basis,
                                                                      operands.offset, operands.width, sums);
  return cudaGetLastError();
}

template <typename S>
cudaError_t sm90_decode(const Sm90Update<S>& update, const Sm90Rows<S>& state, const Sm90Rows<S>& deltas, S* out,
                        cudaStream_t stream) {
  if (!sm90::serves_update(update.width, update.rank) || state.count != deltas.count) return cudaErrorInvalidValue;
  if (state.count == 0) return cudaSuccess;
  sm90::UpdateMaps<S> maps;
  const cudaError_t error = maps.encode(update, state, deltas);
  if (error != cudaSuccess) return error;
  return sm90::by_width(update.width, [&](auto cluster, auto chunks) {
    return sm90::launch<sm90::UpdateTeam<S, cluster, chunks>, cluster, sm90::sm90_decode_kernel<S, cluster, chunks>>(
        state.count, false, stream, maps.moves, maps.complement, maps.basis, sm90::UpdateArguments<S>{update, state, deltas, out});
  });
}

template <typename S>
cudaError_t sm90_decode_backward(const Sm90Update<S>& update, const Sm90Rows<S>& grad, const Sm90Rows<S>& state,
                                 const Sm90Rows<S>& deltas, S* grad_state, S* grad_deltas, cudaStream_t stream) {
  if (!sm90::serves_update(update.width, update.rank) || state.count != deltas.count || state.count != grad.count) {
    return cudaErrorInvalidValue;
  }
  if (state.count == 0) return cudaSuccess;
  sm90::UpdateMaps<S> maps;
  CUtensorMap grad_map;
  cudaError_t error = maps.encode(update, state, deltas);
  if (error == cudaSuccess) error = matrix_map<sm90::kChunkColumns>(&grad_map, grad.data, grad.count, update.width, grad.stride);
  if (error != cudaSuccess) return error;
  return sm90::by_width(update.width, [&](auto cluster, auto chunks) {
    return sm90::launch<sm90::UpdateGradientTeam<S, cluster, chunks>, cluster, sm90::sm90_decode_backward_kernel<S, cluster, chunks>>(
        state.count, false, stream, maps.moves, maps.complement, grad_map, maps.basis,
        sm90::UpdateGradientArguments<S>{update, state, deltas, grad_state, grad_deltas});
  });
}

#define ANISO_INSTANTIATE_SM90(S)                                                                             \
  template cudaError_t sm90_correct<S>(const Sm90Operands<S>&, const Sm90Rows<S>&, S*, cudaStream_t);         \
  template cudaError_t sm90_correct_sums<S>(const Sm90Operands<S>&, const Sm90Rows<S>&, float*, double*,       \
                                              cudaStream_t);                                                    \
  template cudaError_t sm90_correct_backward<S>(const Sm90Operands<S>&, const Sm90Rows<S>&, const Sm90Rows<S>&, S*, cudaStream_t); \
  template cudaError_t sm90_encode<S>(const Sm90Operands<S>&, const Sm90Rows<S>&, S*, cudaStream_t);          \
  template cudaError_t sm90_decode<S>(const Sm90Update<S>&, const Sm90Rows<S>&, const Sm90Rows<S>&, S*, cudaStream_t); \
  template cudaError_t sm90_decode_backward<S>(const Sm90Update<S>&, const Sm90Rows<S>&, const Sm90Rows<S>&,   \
                                               const Sm90Rows<S>&, S*, S*, cudaStream_t)

}  // namespace aniso
