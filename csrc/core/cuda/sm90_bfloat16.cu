// The Hopper kernels for bfloat16 rows, and what does not depend on the format.
#include "sm90_launch.cuh"

namespace aniso {

ANISO_INSTANTIATE_SM90(BFloat16);
template cudaError_t sm90_encode_backward<BFloat16>(const Sm90Operands<BFloat16>&, const Sm90Rows<BFloat16>&, const Sm90Rows<BFloat16>&,
                                                    BFloat16*, cudaStream_t);

bool sm90_present() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return major == 9 && minor == 0;
}

// One for each warp of the largest grid; both formats have the same.
int32_t sm90_sum_slots(int32_t width) {
  return sm90::by_width(width, [](auto cluster, auto chunks) { return sm90::sum_slots<cluster, chunks>(); });
}

}  // namespace aniso
