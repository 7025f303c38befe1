// Time of the CPU kernels between the matrix products, in nanoseconds per row on one thread.
//
//   bench_row_kernels [width] [rank] [rows per chunk] [knots]
//
// Every kernel works again and again on one chunk, as in the operators, where a chunk has just left the products and is
// in cache. A figure is the median of 21 samples of at least 2 ms each, with the 20th and 80th percentile. Scalar
// complement, calibrated. ANISO_CPU_ISA lowers the instruction set.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "aniso/row_kernels.h"

namespace {

using namespace aniso;

struct Sizes {
  int32_t width = 1280;
  int32_t rank = 128;
  int64_t rows = 256;
  int32_t knots = 1024;
  int32_t bucket_count = 1024;
};

template <typename Run>
void report(const char* kernel, const char* formats, int64_t rows, const Run& run) {
  using Clock = std::chrono::steady_clock;
  constexpr int kSamples = 21;
  constexpr double kSampleNanoseconds = 2e6;
  const auto timed = [&](int64_t repeats) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < repeats; ++i) run();
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
  };
  timed(1);
  int64_t repeats = 1;
  while (timed(repeats) < kSampleNanoseconds) repeats *= 2;
  std::vector<double> samples;
  for (int i = 0; i < kSamples; ++i) samples.push_back(timed(repeats) / double(repeats * rows));
  std::sort(samples.begin(), samples.end());
  std::printf("%-24s %-10s %9.1f %9.1f %9.1f\n", kernel, formats, samples[kSamples / 2], samples[kSamples / 5],
              samples[kSamples * 4 / 5]);
}

// A linear congruential sequence in [low, high]; only its spread matters here.
template <typename S>
std::vector<S> values(int64_t size, double low, double high) {
  static uint64_t state = 1;
  std::vector<S> result(static_cast<size_t>(size));
  for (S& value : result) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    value = narrow<S>(typename Working<S>::type(low + (high - low) * double(state >> 11) * 0x1p-53));
  }
  return result;
}

template <typename T>
struct Maps {
  std::vector<Segment<T>> segments;
  std::vector<int16_t> buckets;
  std::vector<int32_t> windows;

  // Evenly spaced knots, one or two to a bucket.
  explicit Maps(const Sizes& s) {
    const double step = 1.0 / s.knots;
    const int32_t window = std::min(s.knots, s.knots / s.bucket_count + 2);
    for (int32_t block = 0; block < s.rank / 2; ++block) {
      segments.push_back({T(0), T(0), T(1.1)});
      for (int32_t i = 1; i <= s.knots; ++i) segments.push_back({T(i * step), T(1.1 * i * step), T(1.1)});
      for (int32_t bucket = 0; bucket < s.bucket_count; ++bucket) {
        const int32_t below = int32_t(int64_t(bucket) * s.knots / s.bucket_count) - 1;
        buckets.push_back(int16_t(std::clamp(below, 0, s.knots - window)));
      }
      windows.push_back(window);
    }
  }
};

template <typename S, typename P>
void bench_initialise(const Sizes& s, const char* formats) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = row_kernels<S, P>();
  const int64_t n = s.rows, state_columns = s.rank / 2 * 3 + s.width;
  const Maps<T> maps(s);
  const std::vector<T> bias = values<T>(s.rank, -0.1, 0.1), target = values<T>(s.rank, -0.1, 0.1);
  const std::vector<T> scale(size_t(s.width), T(0.9)), offset = values<T>(s.width, -0.01, 0.01);
  const std::vector<T> shift = values<T>(s.width, -0.005, 0.005);
  Initialisation<T> init{};
  init.width = s.width;
  init.rank = init.rank_in = init.rank_out = s.rank;
  init.pieces = s.knots + 1;
  init.bucket_count = s.bucket_count;
  init.scalar = T(0.9);
  init.input_bias = bias.data();
  init.target_coordinates = target.data();
  init.segments = maps.segments.data();
  init.buckets = maps.buckets.data();
  init.windows = maps.windows.data();
  init.scale = scale.data();
  init.offset = offset.data();
  init.shift = shift.data();

  const std::vector<S> source = values<S>(n * s.width, -0.1, 0.1);
  const std::vector<P> y = values<P>(n * s.width, -0.1, 0.1), grad_k = values<P>(n * s.rank, -0.3, 0.3);
  const std::vector<T> projected = values<T>(n * s.rank, -0.3, 0.3), back = values<T>(n * s.width, -0.1, 0.1);
  std::vector<T> grad_projected(size_t(n * s.rank));
  const std::vector<P> rebuilt = values<P>(n * s.width, -0.1, 0.1), grad = values<P>(n * s.width, -1, 1);
  const std::vector<P> grad_polar = values<P>(n * state_columns, -1, 1);
  std::vector<P> chunk(size_t(n * s.width)), coefficients(size_t(n * s.rank)), grad_row(size_t(n * s.width));
  std::vector<S> out(size_t(n * s.width)), state(size_t(n * state_columns));
  std::vector<T> scratch(static_cast<size_t>(s.width));

  report("load", formats, n, [&] { kernels.load(source.data(), s.width, 1, n, s.width, chunk.data()); });
  report("correct_map", formats, n, [&] { kernels.correct_map(init, n, projected.data(), coefficients.data()); });
  report("correct_finish", formats, n,
         [&] { kernels.correct_finish(init, n, rebuilt.data(), y.data(), scratch.data(), out.data()); });
  report("correct_finish_backward", formats, n, [&] {
    kernels.correct_finish_backward(init, n, rebuilt.data(), y.data(), grad.data(), scratch.data(), grad_row.data());
  });
  report("correct_map_backward", formats, n,
         [&] { kernels.correct_map_backward(init, n, projected.data(), grad_k.data(), grad_projected.data()); });
  report("add_scaled", formats, n, [&] { kernels.add_scaled(init, n, back.data(), grad.data(), out.data()); });
  report("encode_map", formats, n,
         [&] { kernels.encode_map(init, n, projected.data(), coefficients.data(), state.data()); });
  report("encode_finish", formats, n, [&] { kernels.encode_finish(init, n, rebuilt.data(), y.data(), state.data()); });
  report("encode_map_backward", formats, n, [&] {
    kernels.encode_map_backward(init, n, projected.data(), grad_polar.data(), state_columns, grad_k.data(),
                                grad_projected.data());
  });
}

template <typename S, typename P>
void bench_decode(const Sizes& s, const char* formats) {
  using T = typename Working<P>::type;
  const RowKernels<S, P>& kernels = row_kernels<S, P>();
  const int64_t n = s.rows, state_columns = s.rank / 2 * 3 + s.width, delta_columns = s.rank + s.width;
  const std::vector<T> shift = values<T>(s.width, -0.005, 0.005);
  const Update<T> update{s.width, s.rank, T(0.1), T(0.1), T(0.003), true, shift.data()};
  const std::vector<P> state = values<P>(n * state_columns, -1, 1), deltas = values<P>(n * delta_columns, -2, 2);
  const std::vector<P> step = values<P>(n * s.width, -0.003, 0.003), projected = values<P>(n * s.rank, -0.01, 0.01);
  const std::vector<P> rebuilt = values<P>(n * s.width, -0.1, 0.1), grad = values<P>(n * s.width, -1, 1);
  std::vector<P> new_step(size_t(n * s.width)), coefficients(size_t(n * s.rank)), grad_row(size_t(n * s.width));
  std::vector<S> out(size_t(n * s.width)), grad_state(size_t(n * state_columns)),
      grad_deltas(size_t(n * delta_columns));
  std::vector<T> scratch(static_cast<size_t>(s.width));

  report("decode_step", formats, n, [&] { kernels.decode_step(update, n, deltas.data(), new_step.data()); });
  report("decode_map", formats, n,
         [&] { kernels.decode_map(update, n, state.data(), deltas.data(), projected.data(), coefficients.data()); });
  report("decode_finish", formats, n, [&] {
    kernels.decode_finish(update, n, rebuilt.data(), state.data(), step.data(), scratch.data(), out.data());
  });
  report("decode_finish_backward", formats, n, [&] {
    kernels.decode_finish_backward(update, n, rebuilt.data(), state.data(), step.data(), grad.data(), scratch.data(),
                                   grad_row.data());
  });
  report("decode_backward", formats, n, [&] {
    kernels.decode_backward(update, n, state.data(), deltas.data(), projected.data(), grad.data(), grad.data(),
                            grad_state.data(), grad_deltas.data());
  });
}

template <typename S, typename P>
void bench_formats(const Sizes& sizes, const char* formats) {
  bench_initialise<S, P>(sizes, formats);
  bench_decode<S, P>(sizes, formats);
}

}  // namespace

int main(int count, char** arguments) {
  Sizes sizes;
  const auto argument = [&](int at, int64_t otherwise) { return count > at ? std::atoll(arguments[at]) : otherwise; };
  sizes.width = int32_t(argument(1, sizes.width));
  sizes.rank = int32_t(argument(2, sizes.rank));
  sizes.rows = argument(3, sizes.rows);
  sizes.knots = int32_t(argument(4, sizes.knots));
  if (sizes.rank < 2 || sizes.rank % 2 != 0 || sizes.width < sizes.rank || sizes.rows < 1 || sizes.knots < 2) {
    std::fprintf(stderr, "usage: %s [width] [rank: even, 2 to width] [rows per chunk] [knots: 2 or more]\n",
                 arguments[0]);
    return 2;
  }
  std::printf("%s, width %d, rank %d, %lld rows, %d knots; formats: rows/products; ns per row\n", instruction_set(),
              sizes.width, sizes.rank, static_cast<long long>(sizes.rows), sizes.knots);
  std::printf("%-24s %-10s %9s %9s %9s\n", "kernel", "formats", "median", "p20", "p80");
  bench_formats<float, float>(sizes, "fp32/fp32");
  bench_formats<Float16, float>(sizes, "fp16/fp32");
  bench_formats<BFloat16, float>(sizes, "bf16/fp32");
  bench_formats<BFloat16, BFloat16>(sizes, "bf16/bf16");
  bench_formats<double, double>(sizes, "fp64/fp64");
  return 0;
}
