// Function and loop qualifiers for code that host and device share.
#pragma once

#if defined(__CUDACC__)
#define ANISO_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
// Forced: a unit compiled for AVX-512 must not leave an out-of-line copy that the linker could hand to other units.
#define ANISO_INLINE __attribute__((always_inline)) inline
#else
#define ANISO_INLINE __forceinline
#endif

// Iterations are independent (or sum into the named variables): vectorise. Needs -fopenmp-simd, not the OpenMP runtime.
#define ANISO_PRAGMA(text) _Pragma(#text)
#define ANISO_SIMD ANISO_PRAGMA(omp simd)
#define ANISO_SIMD_SUM(...) ANISO_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
