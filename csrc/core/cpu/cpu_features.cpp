// What the processor can do, read once.
#include <cstdlib>
#include <cstring>

#include "cpu_features.h"

#if defined(ANISO_X86_DISPATCH)
#include <cpuid.h>
#endif

namespace aniso {
namespace {

Isa supported_isa() {
#if defined(ANISO_X86_DISPATCH)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

Isa chosen_isa() {
  static const Isa chosen = [] {
    const Isa best = supported_isa();
    const char* wanted = std::getenv("ANISO_CPU_ISA");
    if (wanted == nullptr) return best;
    if (std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
    return best;
  }();
  return chosen;
}

const char* instruction_set() {
  switch (chosen_isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool has_bfloat16_products() {
#if defined(ANISO_X86_DISPATCH)
  if (chosen_isa() != Isa::avx512) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool avx512_bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && ((eax >> 5) & 1u);
  const bool amx_bf16 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && ((edx >> 22) & 1u);
  return avx512_bf16 || amx_bf16;
#else
  return false;
#endif
}

}  // namespace aniso
