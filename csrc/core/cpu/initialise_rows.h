// Kernels of `correct` and `encode`; included once per instruction set.
//
// Blocks are the outer loop and rows the inner one: the tables of one block stay in the first-level cache while a tile of
// rows looks its radii up.

constexpr int32_t kTile = 256;

// Asks for memory that is read soon.
ANISO_INLINE void prefetch(const void* memory, int64_t bytes) {
#if defined(__GNUC__)
  constexpr int64_t kCacheLine = 64;
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(memory) + at);
#else
  (void)memory, (void)bytes;
#endif
}

// One block of a tile of rows.
template <typename T>
struct BlockTile {
  T centred_a[kTile], centred_b[kTile];  // c_t
  T radius[kTile], inverse_length[kTile], cos[kTile], sin[kTile];
  T mapped[kTile], slope[kTile];
  int32_t bucket[kTile];

  Polar<T> polar(int32_t j) const { return {radius[j], inverse_length[j], cos[j], sin[j]}; }
};

// Mapped radii of a tile; kWindow is the window, or 0 for any. Scalar on purpose: gathers are no faster here.
template <int32_t kWindow, typename T>
void look_up(const Segment<T>* segments, const int16_t* buckets, int32_t window, int32_t rows, BlockTile<T>& t) {
  for (int32_t j = 0; j < rows; ++j) {
    const int32_t base = buckets[t.bucket[j]];
    int32_t piece = base;
    if (kWindow == 0) {
      piece = find_segment(segments, base, window, t.radius[j]);
    } else {
      for (int32_t i = 1; i <= kWindow; ++i) piece += segments[base + i].start <= t.radius[j] ? 1 : 0;
    }
    const Mapped<T> mapped = map_radius(segments[piece], t.radius[j]);
    t.mapped[j] = mapped.radius;
    t.slope[j] = mapped.slope;
  }
}

template <typename T>
ANISO_INLINE void load_block(const Initialisation<T>& init, const T* projected, int32_t block, int32_t rows, BlockTile<T>& t) {
  const int32_t column = 2 * block;
  const T bias_a = init.input_bias[column], bias_b = init.input_bias[column + 1];
  const T target_a = init.target_coordinates[column], target_b = init.target_coordinates[column + 1];
  const int64_t stride = init.rank_in;
  for (int32_t j = 0; j < rows; ++j) {
    t.centred_a[j] = projected[j * stride + column] + bias_a;
    t.centred_b[j] = projected[j * stride + column + 1] + bias_b;
  }
  // The loops below run over whole tiles, whatever the lanes past `rows` hold.
  for (int32_t j = rows; j < kTile; ++j) t.centred_a[j] = t.centred_b[j] = T(0);
  ANISO_SIMD
  for (int32_t j = 0; j < kTile; ++j) {
    const Polar<T> p = to_polar(t.centred_a[j] + target_a, t.centred_b[j] + target_b);
    t.radius[j] = p.radius;
    t.inverse_length[j] = p.inverse_length;
    t.cos[j] = p.cos;
    t.sin[j] = p.sin;
  }
  const Segment<T>* segments = init.segments + int64_t(block) * init.pieces;
  const int16_t* buckets = init.buckets + int64_t(block) * init.bucket_count;
  const int32_t window = init.windows[block];
  const T bucket_scale = T(init.bucket_count) / segments[init.pieces - 1].start;
  ANISO_SIMD
  for (int32_t j = 0; j < kTile; ++j) t.bucket[j] = bucket_of(t.radius[j], bucket_scale, init.bucket_count);
  if (2 * (block + 1) < init.rank) {
    prefetch(segments + init.pieces, int64_t(init.pieces) * sizeof(Segment<T>));
    prefetch(buckets + init.bucket_count, int64_t(init.bucket_count) * sizeof(int16_t));
  }
  // The few knots of a usual window are compared side by side, those of a long one halved.
  using LookUp = void (*)(const Segment<T>*, const int16_t*, int32_t, int32_t, BlockTile<T>&);
  static constexpr LookUp kByWindow[] = {look_up<0, T>, look_up<1, T>, look_up<2, T>, look_up<3, T>, look_up<4, T>,
                                         look_up<5, T>, look_up<6, T>, look_up<7, T>, look_up<8, T>};
  kByWindow[window <= 8 ? window : 0](segments, buckets, window, rows, t);
}

// Coefficients k of the rebuild, for c^ = (a, b) of one block of one row.
template <typename P, typename T>
ANISO_INLINE void store_coefficients(const Initialisation<T>& init, const BlockTile<T>& t, int32_t j, int32_t column,
                                     const T* projected_row, T a, T b, P* row) {
  if (init.rank_out == init.rank) {
    row[column] = narrow<P>(a - init.scalar * t.centred_a[j]);
    row[column + 1] = narrow<P>(b - init.scalar * t.centred_b[j]);
    return;
  }
  if (init.rank_in != init.rank) {
    a -= projected_row[init.rank + column] + init.input_bias[init.rank + column];
    b -= projected_row[init.rank + column + 1] + init.input_bias[init.rank + column + 1];
  }
  row[column] = narrow<P>(a);
  row[column + 1] = narrow<P>(b);
  row[init.rank + column] = narrow<P>(t.centred_a[j]);
  row[init.rank + column + 1] = narrow<P>(t.centred_b[j]);
}

// The reverse: gradient at c_t (and p) from the gradient at k, plus what reaches c_t through the block's map.
template <typename P, typename T>
ANISO_INLINE void store_projected_gradient(
    const Initialisation<T>& init, int32_t column, const P* grad_coefficients, T through_a, T through_b, T* grad) {
  const T grad_a = widen(grad_coefficients[column]), grad_b = widen(grad_coefficients[column + 1]);
  if (init.rank_out == init.rank) {
    grad[column] = through_a - init.scalar * grad_a;
    grad[column + 1] = through_b - init.scalar * grad_b;
    return;
  }
  grad[column] = through_a + widen(grad_coefficients[init.rank + column]);
  grad[column + 1] = through_b + widen(grad_coefficients[init.rank + column + 1]);
  if (init.rank_in != init.rank) {
    grad[init.rank + column] = -grad_a;
    grad[init.rank + column + 1] = -grad_b;
  }
}

// body(tile, block, first row of the tile, rows in it) for every block of every tile.
template <typename T, typename Body>
ANISO_INLINE void for_each_block(const Initialisation<T>& init, int64_t n, const T* projected, const Body& body) {
  BlockTile<T> tile;
  for (int64_t first = 0; first < n; first += kTile) {
    const int32_t rows = int32_t(n - first < kTile ? n - first : kTile);
    for (int32_t block = 0; block < init.rank / 2; ++block) {
      load_block(init, projected + first * init.rank_in, block, rows, tile);
      body(tile, block, first, rows);
    }
  }
}

template <typename P, typename T>
void correct_map(const Initialisation<T>& init, int64_t n, const T* projected, P* coefficients) {
  for_each_block(init, n, projected, [&](const BlockTile<T>& t, int32_t block, int64_t first, int32_t rows) {
    for (int32_t j = 0; j < rows; ++j) {
      const int64_t row = first + j;
      store_coefficients(init, t, j, 2 * block, projected + row * init.rank_in, t.mapped[j] * t.cos[j],
                         t.mapped[j] * t.sin[j], coefficients + row * init.rank_out);
    }
  });
}

template <typename P, typename T>
void correct_map_backward(
    const Initialisation<T>& init, int64_t n, const T* projected, const P* grad_coefficients, T* grad_projected) {
  for_each_block(init, n, projected, [&](const BlockTile<T>& t, int32_t block, int64_t first, int32_t rows) {
    for (int32_t j = 0; j < rows; ++j) {
      const P* grad = grad_coefficients + (first + j) * init.rank_out;
      T through_a, through_b;
      map_backward(t.polar(j), Mapped<T>{t.mapped[j], t.slope[j]}, widen(grad[2 * block]), widen(grad[2 * block + 1]),
                   &through_a, &through_b);
      store_projected_gradient(
          init, 2 * block, grad, through_a, through_b, grad_projected + (first + j) * init.rank_in);
    }
  });
}

// i -> the functor j -> w_ij.
template <typename P, typename T>
ANISO_INLINE auto unnormalised_rows(const Initialisation<T>& init, const P* rebuilt, const P* y) {
  return [=, &init](int64_t i) {
    const P *rebuilt_row = rebuilt + i * init.width, *y_row = y + i * init.width;
    const T *scale = init.scale, *offset = init.offset;
    return [=](int32_t j) { return widen(rebuilt_row[j]) + scale[j] * widen(y_row[j]) + offset[j]; };
  };
}

template <typename S, typename P, typename T>
void correct_finish(const Initialisation<T>& init, int64_t n, const P* rebuilt, const P* y, T* scratch, S* out) {
  finish_rows(unnormalised_rows(init, rebuilt, y), n, init.width, init.shift, scratch, out);
}

template <typename P, typename T>
void correct_finish_backward(const Initialisation<T>& init, int64_t n, const P* rebuilt, const P* y, const P* grad,
                             T* scratch, P* grad_row) {
  finish_rows_backward(unnormalised_rows(init, rebuilt, y), n, init.width, init.shift, grad, scratch, grad_row);
}

template <typename S, typename P, typename T>
void add_scaled(const Initialisation<T>& init, int64_t n, const T* back_projected, const P* grad_row, S* grad_y) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * init.width;
    ANISO_SIMD
    for (int32_t j = 0; j < init.width; ++j) {
      grad_y[at + j] = narrow<S>(back_projected[at + j] + init.scale[j] * widen(grad_row[at + j]));
    }
  }
}

template <typename S, typename P, typename T>
void encode_map(const Initialisation<T>& init, int64_t n, const T* projected, P* coefficients, S* out) {
  const int32_t blocks = init.rank / 2;
  const int64_t stride = 3 * blocks + init.width;
  for_each_block(init, n, projected, [&](BlockTile<T>& t, int32_t block, int64_t first, int32_t rows) {
    T log_radius[kTile];
    ANISO_SIMD
    for (int32_t j = 0; j < kTile; ++j) log_radius[j] = log_of(t.mapped[j]);
    for (int32_t j = 0; j < rows; ++j) {
      const int64_t row = first + j;
      S* state = out + row * stride + block;
      state[0] = narrow<S>(t.sin[j]);
      state[blocks] = narrow<S>(t.cos[j]);
      state[2 * blocks] = narrow<S>(log_radius[j]);
      store_coefficients(init, t, j, 2 * block, projected + row * init.rank_in, T(0), T(0),
                         coefficients + row * init.rank_out);
    }
  });
}

template <typename S, typename P, typename T>
void encode_finish(const Initialisation<T>& init, int64_t n, const P* rebuilt, const P* y, S* out) {
  const int64_t polar_columns = init.rank / 2 * 3;
  const auto rows = unnormalised_rows(init, rebuilt, y);
  for (int64_t i = 0; i < n; ++i) {
    const auto v0 = rows(i);
    S* row = out + i * (polar_columns + init.width) + polar_columns;
    ANISO_SIMD
    for (int32_t j = 0; j < init.width; ++j) row[j] = narrow<S>(v0(j));
  }
}

template <typename P, typename T>
void encode_map_backward(const Initialisation<T>& init, int64_t n, const T* projected, const P* grad_polar, int64_t stride,
                         const P* grad_coefficients, T* grad_projected) {
  const int32_t blocks = init.rank / 2;
  for_each_block(init, n, projected, [&](const BlockTile<T>& t, int32_t block, int64_t first, int32_t rows) {
    for (int32_t j = 0; j < rows; ++j) {
      const P* grad = grad_polar + (first + j) * stride + block;
      T through_a, through_b;
      polar_backward(t.polar(j), Mapped<T>{t.mapped[j], t.slope[j]}, widen(grad[0]), widen(grad[blocks]),
                     widen(grad[2 * blocks]), &through_a, &through_b);
      store_projected_gradient(init, 2 * block, grad_coefficients + (first + j) * init.rank_out, through_a, through_b,
                               grad_projected + (first + j) * init.rank_in);
    }
  });
}
