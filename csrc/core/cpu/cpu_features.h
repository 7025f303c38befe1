// Instruction sets that the row kernels are compiled for.
#pragma once

#include "aniso/row_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ANISO_X86_DISPATCH 1
#endif

namespace aniso {

enum class Isa { baseline, avx2, avx512 };

Isa chosen_isa();

}  // namespace aniso
