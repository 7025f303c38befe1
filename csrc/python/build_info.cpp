// What was compiled and what this processor can run: readable without torch.
#include <pybind11/pybind11.h>

#include <thread>

#include "aniso/row_kernels.h"

#define ANISO_TEXT_OF(value) #value
#define ANISO_TEXT(value) ANISO_TEXT_OF(value)

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "Facts of the compiled kernels: how they were built and what this processor can run.";
  module.attr("torch_version") = ANISO_TEXT(ANISO_TORCH_VERSION);
  module.attr("cuda_version") = ANISO_TEXT(ANISO_CUDA_VERSION);
  module.attr("cuda_architectures") = ANISO_TEXT(ANISO_CUDA_ARCHITECTURES);
#if defined(__VERSION__)
  module.attr("compiler") = __VERSION__;
#else
  module.attr("compiler") = "unknown";
#endif
  module.def("instruction_set", &aniso::instruction_set,
             "The instruction set that the CPU kernels use here: avx512, avx2 or baseline.");
  module.def("has_bfloat16_products", &aniso::has_bfloat16_products,
             "Whether the processor multiplies bfloat16 natively.");
  module.def("hardware_threads", [] { return std::thread::hardware_concurrency(); });
}
