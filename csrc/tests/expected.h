// Expected values with their error bounds, and their comparison with what a kernel wrote.
//
// An oracle works in double from the very inputs of the kernel and returns, beside each value, `terms`: the sum of the
// absolute sizes of what was added up on the way, divided down like the value itself. A kernel that works in T makes at
// most `roundings` errors of epsilon(T) relative to those terms, then rounds once to S. So
//
//   |got - value| <= roundings * epsilon(T) * terms + half_ulp(S) * |got| + smallest(S)
//
// and anything beyond that is a wrong formula, a wrong index or a lost row.
#pragma once

#include <cfloat>
#include <cmath>

#include "aniso/storage.h"
#include "check.h"

namespace aniso_test {

struct Expected {
  double value;
  double terms;
};

template <typename T>
constexpr double epsilon() {
  return sizeof(T) == 4 ? double(FLT_EPSILON) : DBL_EPSILON;
}

// Relative half ulp and smallest positive number of a storage format.
template <typename S>
struct Format;
template <>
struct Format<double> {
  static constexpr double kHalfUlp = 0, kSmallest = 0x1p-1022;
  static constexpr const char* kName = "fp64";
};
template <>
struct Format<float> {
  static constexpr double kHalfUlp = 0, kSmallest = 0x1p-126;
  static constexpr const char* kName = "fp32";
};
template <>
struct Format<aniso::Float16> {
  static constexpr double kHalfUlp = 0x1p-11, kSmallest = 0x1p-24;
  static constexpr const char* kName = "fp16";
};
template <>
struct Format<aniso::BFloat16> {
  static constexpr double kHalfUlp = 0x1p-8, kSmallest = 0x1p-126;
  static constexpr const char* kName = "bf16";
};

template <typename S>
double exact(S stored) {
  return double(aniso::widen(stored));
}

template <typename S>
bool agrees(S got, Expected expected, double roundings) {
  using T = typename aniso::Working<S>::type;
  const double value = exact(got);
  return std::fabs(value - expected.value) <=
         roundings * epsilon<T>() * expected.terms + Format<S>::kHalfUlp * std::fabs(value) + Format<S>::kSmallest;
}

#define CHECK_EXPECTED(got, expected, roundings, what, row, column)                                      \
  CHECK(agrees((got), (expected), (roundings)), "%s row %d column %d: %.9g, expected %.9g (terms %.3g)", \
        (what).c_str(), int(row), int(column), exact(got), (expected).value, (expected).terms)

// Random values, rounded to S.
template <typename S>
std::vector<S> random_values(int64_t size, double low, double high, Random& random) {
  std::vector<S> values(static_cast<size_t>(size));
  for (S& value : values) value = aniso::narrow<S>(typename aniso::Working<S>::type(random.uniform(low, high)));
  return values;
}

// Rows of `other` that are not `poisoned` must not differ in one bit; the poisoned one must show it.
template <typename S>
void check_isolated(Guarded<S>& clean, Guarded<S>& other, int64_t rows, int64_t poisoned, const char* what) {
  const int64_t columns = rows > 0 ? clean.size() / rows : 0;
  bool shows = false;
  for (int64_t i = 0; i < rows; ++i) {
    const bool same =
        std::memcmp(clean.data() + i * columns, other.data() + i * columns, size_t(columns) * sizeof(S)) == 0;
    if (i != poisoned) CHECK(same, "%s: a NaN in row %d changed row %d", what, int(poisoned), int(i));
    for (int64_t j = 0; i == poisoned && j < columns; ++j)
      shows = shows || !std::isfinite(exact(other[i * columns + j]));
  }
  CHECK(shows || rows == 0, "%s: a NaN in row %d left no trace", what, int(poisoned));
}

}  // namespace aniso_test
