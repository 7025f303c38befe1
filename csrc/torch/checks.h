// Checks that raise, in Python a RuntimeError.
//
// Messages are joined as strings: torch's own check macro formats through a stream, which crashes where the extension and
// torch do not share one C++ runtime.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace aniso_torch {

template <typename Part>
std::string text(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(part);
  }
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error("aniso_ext: " + (text(parts) + ...));
}

// Error codes of torch's C shim; torch's own macro for this changed its name between 2.11 and 2.13.
inline void check_status(AOTITorchError status, const char* what) {
  check(status == AOTI_TORCH_SUCCESS, what, " failed inside torch");
}

}  // namespace aniso_torch
