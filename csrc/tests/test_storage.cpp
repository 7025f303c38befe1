// Half and bfloat16, exhaustively, against their definition: sign, exponent and significand put together by ldexp, and
// rounding by comparing exact distances to the two neighbours. No tolerance: every bit must agree.
#include "aniso/row_kernels.h"
#include "check.h"

using namespace aniso;
using namespace aniso_test;

namespace {

template <typename S>
struct Layout;
template <>
struct Layout<Float16> {
  static constexpr int kSignificand = 10, kBias = 15;
  static constexpr const char* kName = "half";
};
template <>
struct Layout<BFloat16> {
  static constexpr int kSignificand = 7, kBias = 127;
  static constexpr const char* kName = "bfloat16";
};

// Bits of infinity; patterns above are NaN.
template <typename S>
constexpr uint16_t infinity_bits() {
  return uint16_t(0x7fff >> Layout<S>::kSignificand << Layout<S>::kSignificand);
}

// Value of a pattern without its sign; infinity counts as the next finite number would, which is what rounding needs.
template <typename S>
double magnitude_of(uint16_t bits) {
  const int exponent = bits >> Layout<S>::kSignificand;
  const double fraction = bits & ((1 << Layout<S>::kSignificand) - 1);
  const double one = double(1 << Layout<S>::kSignificand);
  const int shift = (exponent == 0 ? 1 : exponent) - Layout<S>::kBias - Layout<S>::kSignificand;
  return std::ldexp(fraction + (exponent == 0 ? 0.0 : one), shift);
}

// To nearest, ties to even, by bisection over the patterns. All differences are exact in double.
template <typename S>
uint16_t rounded_bits(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(double(value));
  uint16_t low = 0, high = infinity_bits<S>();
  if (magnitude >= magnitude_of<S>(high)) return uint16_t(sign | high);
  while (high - low > 1) {
    const uint16_t middle = uint16_t((low + high) / 2);
    (magnitude_of<S>(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - magnitude_of<S>(low), above = magnitude_of<S>(high) - magnitude;
  const bool up = above < below || (above == below && low % 2 == 1);
  return uint16_t(sign | (up ? high : low));
}

uint32_t bits_of(float value) { return bit_cast<uint32_t>(value); }

template <typename S>
void check_store(float value) {
  const uint16_t expected = rounded_bits<S>(value), got = narrow<S>(value).bits;
  CHECK(got == expected, "%s: %a (%08x) stored as %04x, expected %04x", Layout<S>::kName, double(value), bits_of(value),
        got, expected);
}

template <typename S>
void test_every_pattern() {
  for (uint32_t pattern = 0; pattern <= 0xffff; ++pattern) {
    const S stored{uint16_t(pattern)};
    const float value = widen(stored);
    const uint16_t magnitude = uint16_t(pattern & 0x7fff);
    if (magnitude > infinity_bits<S>()) {
      CHECK(std::isnan(value), "%s %04x must load as NaN, got %a", Layout<S>::kName, pattern, double(value));
      const uint16_t back = narrow<S>(value).bits;
      CHECK((back & 0x7fff) > infinity_bits<S>(), "%s %04x must stay NaN, got %04x", Layout<S>::kName, pattern, back);
      continue;
    }
    const double exact = magnitude == infinity_bits<S>() ? double(INFINITY) : magnitude_of<S>(magnitude);
    const double expected = pattern & 0x8000 ? -exact : exact;
    CHECK(double(value) == expected && std::signbit(value) == std::signbit(expected), "%s %04x loaded as %a, not %a",
          Layout<S>::kName, pattern, double(value), expected);
    CHECK(narrow<S>(value).bits == pattern, "%s %04x came back as %04x", Layout<S>::kName, pattern,
          narrow<S>(value).bits);
  }
}

// Around every boundary between two patterns (the midpoints), where rounding decides.
template <typename S>
void test_every_midpoint() {
  for (uint16_t low = 0; low < infinity_bits<S>(); ++low) {
    const double middle = 0.5 * (magnitude_of<S>(low) + magnitude_of<S>(uint16_t(low + 1)));
    const float at = float(middle);
    for (const float value : {at, std::nextafterf(at, 0.0f), std::nextafterf(at, INFINITY)}) {
      check_store<S>(value);
      check_store<S>(-value);
    }
  }
}

template <typename S>
void test_float_sweep() {
  // A prime step: about 650 000 floats of every exponent.
  for (uint64_t bits = 0; bits <= 0xffffffffull; bits += 6607) {
    const float value = bit_cast<float>(uint32_t(bits));
    if (!std::isnan(value)) check_store<S>(value);
  }
  for (const float value : {INFINITY, -INFINITY, 0.0f, -0.0f, 65504.0f, 65519.996f, 65520.0f, 3.4028235e38f, 1e-45f}) {
    check_store<S>(value);
  }
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff800001u, 0x7fffffffu}) {
    const uint16_t got = narrow<S>(bit_cast<float>(nan)).bits;
    CHECK((got & 0x7fff) > infinity_bits<S>(), "%s: NaN %08x stored as %04x", Layout<S>::kName, nan, got);
  }
}

// The vectorised loops of the kernels give what the scalar conversions give.
template <typename S>
void test_in_kernels() {
  constexpr int64_t kAll = 0x10000;
  std::vector<S> patterns(kAll);
  for (int64_t i = 0; i < kAll; ++i) patterns[size_t(i)].bits = uint16_t(i);
  Guarded<float> loaded(kAll);
  row_kernels<S, float>().load(patterns.data(), kAll, 1, 1, kAll, loaded.data());
  for (int64_t i = 0; i < kAll; ++i) {
    const float expected = widen(patterns[size_t(i)]);
    CHECK(bits_of(loaded[i]) == bits_of(expected) || std::isnan(expected), "%s %04x: the load kernel gives %a",
          Layout<S>::kName, unsigned(i), double(loaded[i]));
    CHECK(std::isnan(expected) == std::isnan(loaded[i]), "%s %04x: NaN lost in the load kernel", Layout<S>::kName,
          unsigned(i));
  }
  CHECK(loaded.intact(), "%s: the load kernel wrote outside its chunk", Layout<S>::kName);

  // x + 0 * 0 = x for every float but -0.
  std::vector<float> values, zeros;
  for (uint64_t bits = 1; bits <= 0xffffffffull; bits += 60013) {
    const float value = bit_cast<float>(uint32_t(bits));
    if (!std::isnan(value) && value != 0) values.push_back(value);
  }
  zeros.assign(values.size(), 0.0f);
  Initialisation<float> init{};
  init.width = int32_t(values.size());
  init.scale = zeros.data();
  Guarded<S> stored(init.width);
  row_kernels<S, float>().add_scaled(init, 1, values.data(), zeros.data(), stored.data());
  for (int64_t i = 0; i < init.width; ++i) {
    const uint16_t expected = narrow<S>(values[size_t(i)]).bits;
    CHECK(stored[i].bits == expected, "%s: %a stored by a kernel as %04x, expected %04x", Layout<S>::kName,
          double(values[size_t(i)]), stored[i].bits, expected);
  }
  CHECK(stored.intact(), "%s: a kernel wrote outside its rows", Layout<S>::kName);
}

template <typename S>
void test_format() {
  test_every_pattern<S>();
  test_every_midpoint<S>();
  test_float_sweep<S>();
  test_in_kernels<S>();
}

}  // namespace

void aniso_test::run_tests() {
  test_format<Float16>();
  test_format<BFloat16>();
}
