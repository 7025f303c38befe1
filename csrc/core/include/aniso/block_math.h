// The mathematics of one two-dimensional block, for CPU and GPU kernels alike (METHOD sections 2 and 4).
//
//   rho = sqrt(a^2 + b^2 + eps)      direction = (a, b)/sqrt(a^2 + b^2), (1, 0) at the origin
//   T(rho) = value + (rho - start) * slope                                  one linear piece of the radius map
//
// Gradients never pass through atan2, and at the origin the phase has none.
#pragma once

#include <cmath>
#include <cstdint>

#include "aniso/config.h"

namespace aniso {

constexpr double kRadiusEps = 1e-12;
constexpr double kNormFloor = 1e-12;

template <typename T>
struct Polar {
  T radius;          // rho
  T inverse_length;  // 1/sqrt(a^2 + b^2), 0 at the origin
  T cos;
  T sin;
};

template <typename T>
ANISO_INLINE Polar<T> to_polar(T a, T b) {
  const T squared = a * a + b * b;
  const bool at_origin = squared == T(0);
  const T inverse = at_origin ? T(0) : T(1) / std::sqrt(squared);
  return {std::sqrt(squared + T(kRadiusEps)), inverse, at_origin ? T(1) : a * inverse, b * inverse};
}

// Number of knots at or below rho: the piece of the map that rho falls in. A branch-free halving whose trip count
// depends on `knots` alone, so that lanes of a vector or warp stay together. A NaN falls in piece 0.
template <typename T>
ANISO_INLINE int32_t find_segment(const T* knots_sorted, int32_t knots, T rho) {
  int32_t base = 0;
  int32_t length = knots;
  while (length > 1) {
    const int32_t half = length / 2;
    base += (knots_sorted[base + half - 1] <= rho) ? half : 0;
    length -= half;
  }
  return base + (knots_sorted[base] <= rho ? 1 : 0);
}

template <typename T>
struct Mapped {
  T radius;  // T(rho)
  T slope;   // dT/drho
};

// `segments` is [3, pieces]: start, value, slope; `starts[0]` = 0 is not a knot.
template <typename T>
ANISO_INLINE Mapped<T> map_radius(const T* segments, int32_t pieces, T rho) {
  const int32_t piece = find_segment(segments + 1, pieces - 1, rho);
  const T slope = segments[2 * pieces + piece];
  return {segments[pieces + piece] + (rho - segments[piece]) * slope, slope};
}

// Gradient of c^ = T(rho) * direction with respect to (a, b), given that with respect to c^.
template <typename T>
ANISO_INLINE void map_backward(const Polar<T>& polar, const Mapped<T>& mapped, T grad_a, T grad_b, T* out_a, T* out_b) {
  const T radial = grad_a * polar.cos + grad_b * polar.sin;
  const T tangential = grad_b * polar.cos - grad_a * polar.sin;
  // d rho / d length = length / rho; both factors vanish at the origin through inverse_length = 0.
  const T along = polar.inverse_length == T(0) ? T(0) : radial * mapped.slope / (polar.radius * polar.inverse_length);
  const T across = tangential * mapped.radius * polar.inverse_length;
  *out_a = polar.cos * along - polar.sin * across;
  *out_b = polar.sin * along + polar.cos * across;
}

}  // namespace aniso
