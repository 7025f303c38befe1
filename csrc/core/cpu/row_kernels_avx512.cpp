// Row kernels for AVX-512. Standard headers come first: their inline functions must not be compiled for AVX-512.
#if defined(__x86_64__) && defined(__GNUC__)
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define ANISO_ISA avx512
#include "row_kernels_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
