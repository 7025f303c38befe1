// exp, log, tanh, sin and cos without calls or branches, so that loops over them vectorise.
//
// float: polynomial and rational forms after range reduction (coefficients of the Cephes library, S. Moshier), a few
// units in the last place. double: the C library's functions, chosen for accuracy.
#pragma once

#include <cmath>
#include <cstdint>

#include "aniso/config.h"
#include "aniso/storage.h"

namespace aniso {

ANISO_INLINE double exp_of(double x) { return std::exp(x); }
ANISO_INLINE double log_of(double x) { return std::log(x); }
ANISO_INLINE double tanh_of(double x) { return std::tanh(x); }
ANISO_INLINE void sincos_of(double x, double* sin, double* cos) {
#if defined(__CUDA_ARCH__)
  ::sincospi(x * 0.31830988618379067154, sin, cos);  // sin() keeps a table for large angles in local memory
#else
  *sin = std::sin(x);
  *cos = std::cos(x);
#endif
}

// Nearest integer of |x| < 2^22 by adding and taking away 1.5 * 2^23.
ANISO_INLINE float nearest(float x) {
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

ANISO_INLINE float exp_of(float x) {
  const float largest = 88.72284f;  // log of the largest float
  const float capped = x < largest ? x : largest;
  const float clamped = x > -87.3f ? capped : -87.3f;  // a NaN becomes a number here: it must not be cast to int
  const float n = nearest(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, one exponent field does not.
  const int32_t half = int32_t(n) / 2;
  const float low = bit_cast<float>(uint32_t(half + 127) << 23);
  const float high = bit_cast<float>(uint32_t(int32_t(n) - half + 127) << 23);
  const float scaled = value * low * high;
  const float bounded = x > largest ? INFINITY : (x < -87.3f ? 0.0f : scaled);
  return x == x ? bounded : x;
}

ANISO_INLINE float log_of(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const uint32_t bits = bit_cast<uint32_t>(subnormal ? x * 8388608.0f : x);
  int32_t exponent = int32_t(bits >> 23) - (subnormal ? 149 : 126);
  float m = bit_cast<float>((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const bool small = m < 0.707106781186547524f;
  exponent -= small ? 1 : 0;
  m = (small ? m + m : m) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  const float e = float(exponent);
  p = p + e * -2.12194440e-4f;
  p = p - 0.5f * z;
  const float value = m + p + e * 0.693359375f;
  const float positive = x == INFINITY ? x : value;
  const float at_zero = x == 0.0f ? -INFINITY : NAN;
  return x > 0.0f ? positive : at_zero;  // NaN compares false and stays NaN
}

ANISO_INLINE float tanh_of(float x) {
  const float magnitude = std::fabs(x);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near_zero = p * z * x + x;
  const float bounded = magnitude > 44.0f ? 44.0f : magnitude;
  const float away = 1.0f - 2.0f / (exp_of(bounded + bounded) + 1.0f);
  const float signed_away = x < 0.0f ? -away : away;
  const float value = magnitude < 0.625f ? near_zero : signed_away;
  return x == x ? value : x;
}

ANISO_INLINE void sincos_of(float x, float* sin, float* cos) {
  const float quadrant = nearest(x == x ? x * 0.63661977236758134f : 0.0f);
  float r = x - quadrant * 1.5703125f;
  r = r - quadrant * 4.837512969970703125e-4f;
  r = r - quadrant * 7.54978995489188216e-8f;
  const float z = r * r;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  const float sin_r = s * z * r + r;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  const float cos_r = c * z * z - 0.5f * z + 1.0f;
  const int32_t q = int32_t(quadrant) & 3;
  const float sin_q = (q & 1) ? cos_r : sin_r;
  const float cos_q = (q & 1) ? sin_r : cos_r;
  *sin = (q & 2) ? -sin_q : sin_q;
  *cos = (q == 1 || q == 2) ? -cos_q : cos_q;
}

}  // namespace aniso
