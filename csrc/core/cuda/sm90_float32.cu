// The Hopper kernel for float32 rows.
#include "sm90_correct_tf32.cuh"
#include "sm90_launch.cuh"

namespace aniso {

cudaError_t sm90_correct(const Sm90Operands<Float16>& operands, const Sm90Rows<float>& y, float* out, cudaStream_t stream) {
  if (!sm90::serves(operands, y) || operands.diagonal) return cudaErrorInvalidValue;
  if (y.count == 0) return cudaSuccess;
  CUtensorMap rows_map, basis_map;
  cudaError_t error = matrix_map<sm90::kBoxColumns>(&rows_map, y.data, y.count, operands.width, y.stride);
  if (error == cudaSuccess) {
    error = matrix_map<sm90::kPanelColumns>(&basis_map, operands.shuffled, sm90_padded(operands.width), sm90::kRank, sm90::kRank);
  }
  if (error != cudaSuccess) return error;
  return sm90::by_width(operands.width, [&](auto cluster, auto chunks) {
    return sm90::launch<sm90::Tf32Team<cluster, chunks>, cluster, sm90::sm90_correct_tf32_kernel<cluster, chunks>>(
        y.count, false, stream, rows_map, basis_map, sm90::Tf32Arguments{operands, y.count, out});
  });
}

}  // namespace aniso
