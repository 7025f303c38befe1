// What the Hopper kernel does with the values of a thread: roots and norms, the radius map of a block, sums over lanes.
#pragma once

#include "aniso/cuda_sm90.h"
#include "aniso/turn.h"
#include "sm90_instructions.cuh"

namespace aniso::sm90 {

__device__ __forceinline__ float square_root(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

__device__ __forceinline__ float inverse_root(float x) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

struct Scales {
  float length;   // |w|
  float inverse;  // 1/|w|
  float outer;    // 1/|h|
};

// The norms of aniso/row_scales.h by approximate roots, 2^-22 off: exact ones are slower than a product.
__device__ __forceinline__ Scales fast_scales(float squares, float dot_shift, float shift_squares, bool shifted) {
  constexpr float kFloor = float(kNormFloor), kLeast = kFloor * kFloor;
  const auto inverse_of = [&](float square) { return square < kLeast ? 1.f / kFloor : inverse_root(square); };
  const float inverse = inverse_of(squares), length = squares < kLeast ? kFloor : squares * inverse;
  if (!shifted) return {length, inverse, 1.f};
  return {length, inverse, inverse_of(squares * inverse * inverse + 2.f * dot_shift * inverse + shift_squares)};
}

// Of both rows of a thread, from |w|^2 and w.shift of each.
__device__ __forceinline__ void fast_scales(const float (&sums)[4], float shift_squares, bool shifted, Scales (&scales)[2]) {
#pragma unroll
  for (int32_t half = 0; half < 2; ++half) scales[half] = fast_scales(sums[2 * half], sums[2 * half + 1], shift_squares, shifted);
}

template <typename S>
__device__ __forceinline__ float rounded(float value) {
  return unpack<S>(pack<S>(value, 0.f)).x;
}

// Volatile, so that loads stay where they are used: hoisted together they would push the sums out of the registers.
__device__ __forceinline__ float2 load_pair(const float* values) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared_address(values)));
  return pair;
}

__device__ __forceinline__ float load_number(uint32_t address) {
  float number;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(number) : "r"(address));
  return number;
}

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2^-11 off, less than the rounding of what it is taken of.
__device__ __forceinline__ float fast_tanh(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A quarter of 1 - tanh(x)^2, which would double the error of a fast tanh.
__device__ __forceinline__ float quarter_tanh_slope(float x) {
  const float e = power_of_two(fabsf(x) * (-2.f * kLog2E)), part = reciprocal(1.f + e);
  return e * part * part;
}

// turn() of aniso/turn.h by the fast exponential, sine and cosine, 2^-20 off.
__device__ __forceinline__ Turn<float> fast_turn(float sin0, float cos0, float log_radius, float delta_theta, float delta_rho,
                                                 float a_theta, float a_rho) {
  const auto tanh = [](float x) { return fmaf(-2.f, reciprocal(power_of_two(x * (2.f * kLog2E)) + 1.f), 1.f); };
  Turn<float> t;
  t.tanh_theta = tanh(delta_theta);
  t.tanh_rho = tanh(delta_rho);
  __sincosf(a_theta * t.tanh_theta, &t.step_sin, &t.step_cos);
  t.radius = power_of_two(kLog2E * fmaf(a_rho, t.tanh_rho, log_radius));
  t.cos = cos0 * t.step_cos - sin0 * t.step_sin;
  t.sin = sin0 * t.step_cos + cos0 * t.step_sin;
  return t;
}

// One of four values side by side.
template <typename S>
__device__ __forceinline__ float value_of(const uint2& four, int32_t index) {
  const float2 pair = unpack<S>(index < 2 ? four.x : four.y);
  return index % 2 == 0 ? pair.x : pair.y;
}

// a.b of vectors [size], zero if one is missing, in every lane of a warp.
__device__ __forceinline__ float dot_of(const float* a, const float* b, int32_t size, int32_t lane) {
  float sum = 0.f;
  for (int32_t j = lane; a != nullptr && b != nullptr && j < size; j += 32) sum += a[j] * b[j];
#pragma unroll
  for (int32_t step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ float sum_over_row(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Sum over the eight lanes that share a column.
__device__ __forceinline__ float sum_over_rows(float value) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// One value of eight for each of the eight lanes that share a column: lane row i gets the sum of values[i] over them.
__device__ __forceinline__ float sum_over_column(const float (&values)[8], int32_t lane_row) {
  float half[4], quarter[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool upper = lane_row & 4;
    half[i] = (upper ? values[i + 4] : values[i]) + __shfl_xor_sync(0xffffffffu, upper ? values[i] : values[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool upper = lane_row & 2;
    quarter[i] = (upper ? half[i + 2] : half[i]) + __shfl_xor_sync(0xffffffffu, upper ? half[i] : half[i + 2], 8);
  }
  const bool upper = lane_row & 1;
  return (upper ? quarter[1] : quarter[0]) + __shfl_xor_sync(0xffffffffu, upper ? quarter[0] : quarter[1], 4);
}

}  // namespace aniso::sm90
