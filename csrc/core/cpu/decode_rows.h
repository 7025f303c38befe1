// Kernels of `decode`; included once per instruction set.
//
// A row of state is [sin; cos; log rho; v0], a row of deltas [dtheta; drho; dv] (METHOD section 4).

template <typename P, typename T>
ANISO_INLINE Turn<T> turn_block(const Update<T>& u, const P* state, const P* deltas, int32_t block) {
  const int32_t blocks = u.rank / 2;
  return turn(widen(state[block]), widen(state[blocks + block]), widen(state[2 * blocks + block]),
              widen(deltas[block]), widen(deltas[blocks + block]), u.a_theta, u.a_rho);
}

template <typename P, typename T>
void decode_step(const Update<T>& u, int64_t n, const P* deltas, P* step) {
  const int64_t stride = u.rank + u.width;
  for (int64_t i = 0; i < n; ++i) {
    const P* dv = deltas + i * stride + u.rank;
    P* row = step + i * u.width;
    ANISO_SIMD
    for (int32_t j = 0; j < u.width; ++j) row[j] = narrow<P>(u.a_v * tanh_of(widen(dv[j])));
  }
}

template <bool kProject, typename P, typename T>
ANISO_INLINE void decode_map_rows(
    const Update<T>& u, int64_t n, const P* state, const P* deltas, const P* projected_step, P* coefficients) {
  const int32_t blocks = u.rank / 2;
  for (int64_t i = 0; i < n; ++i) {
    const P* state_row = state + i * (3 * blocks + u.width);
    const P* delta_row = deltas + i * (u.rank + u.width);
    P* row = coefficients + i * u.rank;
    ANISO_SIMD
    for (int32_t block = 0; block < blocks; ++block) {
      const Turn<T> t = turn_block(u, state_row, delta_row, block);
      T a = t.radius * t.cos, b = t.radius * t.sin;
      if (kProject) {
        a -= widen(projected_step[i * u.rank + 2 * block]);
        b -= widen(projected_step[i * u.rank + 2 * block + 1]);
      }
      row[2 * block] = narrow<P>(a);
      row[2 * block + 1] = narrow<P>(b);
    }
  }
}

// The choice is made outside the loop: a branch inside would keep it from being vectorised.
template <typename P, typename T>
void decode_map(
    const Update<T>& u, int64_t n, const P* state, const P* deltas, const P* projected_step, P* coefficients) {
  if (projected_step) {
    decode_map_rows<true>(u, n, state, deltas, projected_step, coefficients);
  } else {
    decode_map_rows<false>(u, n, state, deltas, projected_step, coefficients);
  }
}

// i -> the functor j -> w_ij.
template <typename P, typename T>
ANISO_INLINE auto updated_rows(const Update<T>& u, const P* rebuilt, const P* state, const P* step) {
  return [=, &u](int64_t i) {
    const int64_t polar_columns = u.rank / 2 * 3;
    const P *rebuilt_row = rebuilt + i * u.width, *step_row = step + i * u.width;
    const P* v0 = state + i * (polar_columns + u.width) + polar_columns;
    return [=](int32_t j) -> T { return widen(rebuilt_row[j]) + widen(v0[j]) + widen(step_row[j]); };
  };
}

template <typename S, typename P, typename T>
void decode_finish(
    const Update<T>& u, int64_t n, const P* rebuilt, const P* state, const P* step, T* scratch, S* out) {
  finish_rows(updated_rows(u, rebuilt, state, step), n, u.width, u.shift, scratch, out);
}

template <typename P, typename T>
void decode_finish_backward(const Update<T>& u, int64_t n, const P* rebuilt, const P* state, const P* step, const P* grad,
                            T* scratch, P* grad_row) {
  finish_rows_backward(updated_rows(u, rebuilt, state, step), n, u.width, u.shift, grad, scratch, grad_row);
}

template <typename S, typename P, typename T>
void decode_backward(const Update<T>& u, int64_t n, const P* state, const P* deltas, const P* grad_coefficients,
                     const P* grad_row, const P* leak, S* grad_state, S* grad_deltas) {
  const int32_t blocks = u.rank / 2;
  const int64_t state_stride = 3 * blocks + u.width, delta_stride = u.rank + u.width;
  for (int64_t i = 0; i < n; ++i) {
    const P *state_row = state + i * state_stride, *delta_row = deltas + i * delta_stride;
    const P* grad_c = grad_coefficients + i * u.rank;
    S *state_out = grad_state + i * state_stride, *delta_out = grad_deltas + i * delta_stride;
    ANISO_SIMD
    for (int32_t block = 0; block < blocks; ++block) {
      const Turn<T> t = turn_block(u, state_row, delta_row, block);
      const T grad_a = widen(grad_c[2 * block]), grad_b = widen(grad_c[2 * block + 1]);
      const TurnGradient<T> grad = turn_backward(t, grad_a, grad_b, u.a_theta, u.a_rho);
      state_out[block] = narrow<S>(grad.sin0);
      state_out[blocks + block] = narrow<S>(grad.cos0);
      state_out[2 * blocks + block] = narrow<S>(grad.log_radius);
      delta_out[block] = narrow<S>(grad.delta_theta);
      delta_out[blocks + block] = narrow<S>(grad.delta_rho);
    }
    const P* dv = delta_row + u.rank;
    const P* row = grad_row + i * u.width;
    ANISO_SIMD
    for (int32_t j = 0; j < u.width; ++j) {
      const T grad = widen(row[j]);
      const T tanh_dv = tanh_of(widen(dv[j]));
      const T kept = leak ? grad - widen(leak[i * u.width + j]) : grad;
      state_out[3 * blocks + j] = narrow<S>(grad);
      delta_out[u.rank + j] = narrow<S>(u.a_v * (T(1) - tanh_dv * tanh_dv) * kept);
    }
  }
}
