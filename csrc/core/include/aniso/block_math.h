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

// Bucket of a radius among `count` equal ones up to the last knot; see knot_buckets in aniso_ext/ops/operands.py.
template <typename T>
ANISO_INLINE int32_t bucket_of(T rho, T scale, int32_t count) {
  const T last = T(count - 1);
  const T position = rho * scale;
  return position > T(0) ? int32_t(position < last ? position : last) : 0;  // a NaN falls in bucket 0
}

// One linear piece of a radius map: T(rho) = value + (rho - start) * slope from `start` to the next piece's. Together in
// memory, because a radius reads one piece of many.
template <typename T>
struct Segment {
  T start;
  T value;
  T slope;
};

// The piece that rho falls in: the number of knots at or below it, where knot i is the start of piece i + 1. `base`
// knots are known to be below. A branch-free halving whose trip count is the same for every radius, so that lanes of a
// warp stay together.
template <typename T>
ANISO_INLINE int32_t find_segment(const Segment<T>* segments, int32_t base, int32_t window, T rho) {
  while (window > 1) {
    const int32_t half = window / 2;
    base += (segments[base + half].start <= rho) ? half : 0;
    window -= half;
  }
  return base + (segments[base + 1].start <= rho ? 1 : 0);
}

template <typename T>
struct Mapped {
  T radius;  // T(rho)
  T slope;   // dT/drho
};

template <typename T>
ANISO_INLINE Mapped<T> map_radius(const Segment<T>& piece, T rho) {
  return {piece.value + (rho - piece.start) * piece.slope, piece.slope};
}

template <typename T>
ANISO_INLINE Mapped<T> map_radius(const Segment<T>* segments, int32_t base, int32_t window, T rho) {
  return map_radius(segments[find_segment(segments, base, window, rho)], rho);
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

// Gradient of (sin, cos, log T(rho)) of a block with respect to (a, b).
template <typename T>
ANISO_INLINE void polar_backward(const Polar<T>& polar, const Mapped<T>& mapped, T grad_sin, T grad_cos, T grad_log,
                                 T* out_a, T* out_b) {
  const bool at_origin = polar.inverse_length == T(0);
  const T along =
      at_origin ? T(0) : grad_log * mapped.slope / (mapped.radius * polar.radius * polar.inverse_length);
  const T across = (grad_sin * polar.cos - grad_cos * polar.sin) * polar.inverse_length;
  *out_a = polar.cos * along - polar.sin * across;
  *out_b = polar.sin * along + polar.cos * across;
}

}  // namespace aniso
