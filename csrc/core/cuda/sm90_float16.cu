// The Hopper kernels for float16 rows.
#include "sm90_correct.cuh"

namespace aniso {

ANISO_INSTANTIATE_SM90(Float16);

}  // namespace aniso
