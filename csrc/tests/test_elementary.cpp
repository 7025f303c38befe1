// exp, log, tanh, sin and cos in fp32 against the C library in double, in units of the last place (ulp) of the exact
// value. Compiled once per instruction set: fused products change the last bits.
//
// Where the bounds come from (u = 2^-24, half an ulp just above a power of two, one just below):
//   exp   three roundings at the size of the result (p r^2 + r, + 1, the reduced argument): 2 ulp
//   log   one large sum, m + p + e ln 2, and terms below half of it: 2 ulp; next to 1 it is m + p alone
//   tanh  below 0.625 a polynomial: 2 ulp; above, 1 - 2/(e^2x + 1): the error of exp enters times
//         2 e^2x/(e^2x + 1)^2 <= 0.35, the quotient and the difference add half an ulp each: 3 ulp of 0.55
//   sin, cos   absolute, 2 u at most after the three-part reduction, for any |x| <= 8192
#include <cfloat>
#include <cmath>
#include <initializer_list>

#include "aniso/elementary.h"
#include "check.h"

using namespace aniso;
using namespace aniso_test;

namespace {

constexpr int32_t kBatch = 1024;
constexpr double kHalfUlpOfOne = 0x1p-24;

double ulp_of(double value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  return std::ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
}

enum class Spacing { linear, in_bits };

// function is applied to batches, so that it runs vectorised as in the kernels.
template <typename Function, typename Exact>
void sweep(const char* name, float low, float high, int32_t batches, Spacing spacing, double bound, Function function,
           Exact exact) {
  double worst = 0, worst_at = 0;
  float x[kBatch], y[kBatch];
  const double first = bit_cast<uint32_t>(low), last = bit_cast<uint32_t>(high), points = double(batches) * kBatch - 1;
  for (int32_t batch = 0; batch < batches; ++batch) {
    for (int32_t i = 0; i < kBatch; ++i) {
      const double at = (double(batch) * kBatch + i) / points;
      x[i] = spacing == Spacing::linear ? float(double(low) + (double(high) - double(low)) * at)
                                        : bit_cast<float>(uint32_t(first + (last - first) * at));
    }
    ANISO_SIMD
    for (int32_t i = 0; i < kBatch; ++i) y[i] = function(x[i]);
    for (int32_t i = 0; i < kBatch; ++i) {
      const double expected = exact(double(x[i]));
      const double ulps = std::fabs(double(y[i]) - expected) / ulp_of(expected);
      CHECK(ulps <= bound, "%s(%a) = %a is %.3g ulp from %a, bound %.3g", name, double(x[i]), double(y[i]), ulps,
            expected, bound);
      if (ulps > worst) worst = ulps, worst_at = double(x[i]);
    }
  }
  std::printf("%-5s [%10.4g, %10.4g] worst %.3f ulp at %.9g\n", name, double(low), double(high), worst, worst_at);
}

const auto exp_float = [](float x) { return exp_of(x); };
const auto log_float = [](float x) { return log_of(x); };
const auto tanh_float = [](float x) { return tanh_of(x); };

void test_exp() {
  const auto exact = [](double x) { return std::exp(x); };
  sweep("exp", -87.3f, 88.7f, 1500, Spacing::linear, 2, exp_float, exact);
  sweep("exp", 88.7f, 88.7228317f, 8, Spacing::linear, 2, exp_float, exact);
  sweep("exp", 1e-38f, 1.0f, 500, Spacing::in_bits, 2, exp_float, exact);
  sweep("exp", -1e-38f, -1.0f, 500, Spacing::in_bits, 2, exp_float, exact);
  // Below, results are flushed to zero: an absolute error of the smallest normal number, 2^-126, and 2 % more.
  for (float x = -87.3f; x > -110.0f; x -= 0.01f) {
    CHECK(exp_of(x) >= 0 && exp_of(x) <= 1.3e-38f, "exp(%a) = %a", double(x), double(exp_of(x)));
  }
  CHECK(exp_of(0.0f) == 1.0f, "exp(0) = %a", double(exp_of(0.0f)));
  CHECK(exp_of(88.73f) == INFINITY && exp_of(INFINITY) == INFINITY, "exp must overflow to infinity");
  CHECK(exp_of(-INFINITY) == 0.0f, "exp(-inf) = %a", double(exp_of(-INFINITY)));
  CHECK(std::isnan(exp_of(NAN)), "exp(NaN) = %a", double(exp_of(NAN)));
}

void test_log() {
  const auto exact = [](double x) { return std::log(x); };
  sweep("log", FLT_MIN, FLT_MAX, 3000, Spacing::in_bits, 2, log_float, exact);
  sweep("log", 0.5f, 2.0f, 1500, Spacing::linear, 2, log_float, exact);
  CHECK(log_of(1.0f) == 0.0f, "log(1) = %a", double(log_of(1.0f)));
  CHECK(log_of(0.0f) == -INFINITY && log_of(-0.0f) == -INFINITY, "log(0) = %a", double(log_of(0.0f)));
  CHECK(log_of(INFINITY) == INFINITY, "log(inf) = %a", double(log_of(INFINITY)));
  CHECK(std::isnan(log_of(-1.0f)) && std::isnan(log_of(-INFINITY)) && std::isnan(log_of(NAN)), "log must give NaN");
}

void test_tanh() {
  const auto exact = [](double x) { return std::tanh(x); };
  sweep("tanh", 1e-30f, 0.625f, 1000, Spacing::in_bits, 2, tanh_float, exact);
  sweep("tanh", 0.0f, 12.0f, 1500, Spacing::linear, 3, tanh_float, exact);
  sweep("tanh", -12.0f, 0.0f, 1500, Spacing::linear, 3, tanh_float, exact);
  for (const float x : {10.0f, 44.0f, 45.0f, 1e10f, FLT_MAX, INFINITY}) {
    CHECK(tanh_of(x) == 1.0f && tanh_of(-x) == -1.0f, "tanh(%a) = %a", double(x), double(tanh_of(x)));
  }
  CHECK(tanh_of(0.0f) == 0.0f && tanh_of(-0.0f) == 0.0f, "tanh(0) = %a", double(tanh_of(0.0f)));
  CHECK(std::isnan(tanh_of(NAN)), "tanh(NaN) = %a", double(tanh_of(NAN)));
}

void test_sincos() {
  constexpr double kBound = 2 * kHalfUlpOfOne;
  for (const double limit : {0.2, 4.0, 100.0, 8192.0}) {
    double worst = 0;
    constexpr int32_t kPoints = 400 * kBatch;
    for (int32_t first = 0; first < kPoints; first += kBatch) {
      float x[kBatch], sin[kBatch], cos[kBatch];
      for (int32_t i = 0; i < kBatch; ++i) x[i] = float(limit * (2.0 * (first + i) / (kPoints - 1) - 1.0));
      ANISO_SIMD
      for (int32_t i = 0; i < kBatch; ++i) sincos_of(x[i], &sin[i], &cos[i]);
      for (int32_t i = 0; i < kBatch; ++i) {
        const double angle = double(x[i]);
        const double sin_error = std::fabs(double(sin[i]) - std::sin(angle));
        const double cos_error = std::fabs(double(cos[i]) - std::cos(angle));
        const double error = sin_error > cos_error ? sin_error : cos_error;
        CHECK(error <= kBound, "sin, cos(%a) = %a, %a: error %.3g, bound %.3g", angle, double(sin[i]), double(cos[i]),
              error, kBound);
        if (error > worst) worst = error;
      }
    }
    std::printf("sincos within %6g: worst %.3f of 2^-24\n", limit, worst / kHalfUlpOfOne);
  }
  // Small angles keep their relative accuracy: the increments of a decode are small.
  for (float x = 1e-30f; x < 0.7f; x *= 1.01f) {
    float sin = 0, cos = 0;
    sincos_of(-x, &sin, &cos);
    const double expected = std::sin(-double(x));
    CHECK(std::fabs(double(sin) - expected) <= 2 * ulp_of(expected), "sin(%a) = %a", -double(x), double(sin));
  }
  float sin = 1, cos = 0;
  sincos_of(0.0f, &sin, &cos);
  CHECK(sin == 0.0f && cos == 1.0f, "sin, cos(0) = %a, %a", double(sin), double(cos));
  sincos_of(NAN, &sin, &cos);
  CHECK(std::isnan(sin) && std::isnan(cos), "sin, cos(NaN) = %a, %a", double(sin), double(cos));
}

}  // namespace

void aniso_test::run_tests() {
  test_exp();
  test_log();
  test_tanh();
  test_sincos();
}
