// Row kernels for AVX2 with FMA. Standard headers come first: their inline functions must not be compiled for AVX2.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ANISO_ISA avx2
#include "row_kernels_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
