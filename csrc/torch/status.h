// Error codes of torch's C shim as exceptions; torch's own macro for this changed its name between 2.11 and 2.13.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

namespace aniso_torch {

inline void check_status(AOTITorchError status, const char* what) {
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, what, " failed inside torch");
}

}  // namespace aniso_torch
