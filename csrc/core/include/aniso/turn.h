// The bounded update of one block, for CPU and GPU kernels alike (METHOD section 4):
//
//   theta^ = theta0 + a_theta tanh(dtheta)     rho^ = rho0 exp(a_rho tanh(drho))
//
// (cos, sin) of theta0 turn as a vector, so that no angle is ever formed.
#pragma once

#include "aniso/config.h"
#include "aniso/elementary.h"

namespace aniso {

template <typename T>
struct Turn {
  T radius;    // rho^
  T cos, sin;  // of theta^
  T tanh_theta, tanh_rho;
  T step_cos, step_sin;  // of the increment
};

template <typename T>
ANISO_INLINE Turn<T> turn(T sin0, T cos0, T log_radius, T delta_theta, T delta_rho, T a_theta, T a_rho) {
  Turn<T> t;
  t.tanh_theta = tanh_of(delta_theta);
  t.tanh_rho = tanh_of(delta_rho);
  sincos_of(a_theta * t.tanh_theta, &t.step_sin, &t.step_cos);
  t.radius = exp_of(log_radius + a_rho * t.tanh_rho);
  t.cos = cos0 * t.step_cos - sin0 * t.step_sin;
  t.sin = sin0 * t.step_cos + cos0 * t.step_sin;
  return t;
}

// Gradients of c^ = rho^ (cos theta^, sin theta^).
template <typename T>
struct TurnGradient {
  T sin0, cos0, log_radius, delta_theta, delta_rho;
};

template <typename T>
ANISO_INLINE TurnGradient<T> turn_backward(const Turn<T>& t, T grad_a, T grad_b, T a_theta, T a_rho) {
  const T radial = t.radius * (grad_a * t.cos + grad_b * t.sin);
  const T tangential = t.radius * (grad_b * t.cos - grad_a * t.sin);
  return {t.radius * (grad_b * t.step_cos - grad_a * t.step_sin),
          t.radius * (grad_a * t.step_cos + grad_b * t.step_sin), radial,
          a_theta * (T(1) - t.tanh_theta * t.tanh_theta) * tangential,
          a_rho * (T(1) - t.tanh_rho * t.tanh_rho) * radial};
}

}  // namespace aniso
