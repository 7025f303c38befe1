// The Hopper kernels for float16 rows.
#include "sm90_launch.cuh"

namespace aniso {

ANISO_INSTANTIATE_SM90(Float16);

}  // namespace aniso
