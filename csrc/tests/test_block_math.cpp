// The mathematics of one block: radius and direction, the search in the knots, and its gradient.
#include "aniso/block_math.h"

#include <algorithm>
#include <string>

#include "expected.h"
#include "knots.h"

using namespace aniso;
using namespace aniso_test;

namespace {

template <typename T>
void test_find_segment() {
  Random random(11);
  for (int32_t count = 1; count <= 70; ++count) {
    std::vector<T> knots(static_cast<size_t>(count));
    for (T& knot : knots) knot = T(std::round(random.uniform(0.5, 20.5)) / 8);  // many coincide
    std::sort(knots.begin(), knots.end());
    std::vector<Segment<T>> segments{{T(0), T(0), T(1)}};
    for (const T knot : knots) segments.push_back({knot, T(0), T(1)});
    std::vector<T> radii{T(0), T(-1), T(100), T(INFINITY), T(-INFINITY)};
    for (const T knot : knots) {
      radii.insert(radii.end(), {knot, std::nextafter(knot, T(0)), std::nextafter(knot, T(1000))});
    }
    for (const T radius : radii) {
      const int32_t expected = int32_t(std::upper_bound(knots.begin(), knots.end(), radius) - knots.begin());
      const int32_t got = find_segment(segments.data(), 0, count, radius);
      CHECK(got == expected, "%d knots, radius %a: piece %d, expected %d", count, double(radius), got, expected);
      for (int32_t base = std::max(0, expected - 3); base <= expected && base < count; ++base) {
        const int32_t from_base = find_segment(segments.data(), base, count - base, radius);
        CHECK(from_base == expected, "%d knots from %d on, radius %a: piece %d, expected %d", count, base,
              double(radius), from_base, expected);
      }
    }
    CHECK(find_segment(segments.data(), 0, count, T(NAN)) == 0, "%d knots: NaN must fall in piece 0", count);
  }
}

template <typename T>
void check_map(const RadiusMaps<T>& maps, T radius, const std::string& name) {
  const Segment<T>* end = maps.segments.data() + maps.segments.size();
  const Segment<T>* next = std::upper_bound(maps.segments.data() + 1, end, radius,
                                            [](T value, const Segment<T>& piece) { return value < piece.start; });
  const Segment<T>& piece = next[-1];
  const Mapped<T> got = maps(radius);
  const T expected = piece.value + (radius - piece.start) * piece.slope;
  CHECK(got.slope == piece.slope, "%s, radius %a: slope %a, expected %a", name.c_str(), double(radius),
        double(got.slope), double(piece.slope));
  // a fused product may round once less: 2 epsilon of the larger term
  const double bound =
      2 * epsilon<T>() * (std::fabs(double(piece.value)) + std::fabs(double(radius) * double(piece.slope)));
  CHECK(std::isinf(radius) ? got.radius == expected : std::fabs(double(got.radius - expected)) <= bound,
        "%s, radius %a maps to %a, expected %a", name.c_str(), double(radius), double(got.radius), double(expected));
}

// The coarse index gives the piece that a search through all knots gives: for evenly spread knots, for knots that all
// fall in one bucket, for coinciding ones, and for more buckets than knots.
template <typename T>
void test_buckets() {
  Random random(12);
  for (const int32_t knots : {2, 3, 17, 64, 1024}) {
    for (const int32_t bucket_count : {1, 7, 1024}) {
      for (const KnotShape shape : {KnotShape::even, KnotShape::crowded, KnotShape::coinciding}) {
        const RadiusMaps<T> maps(1, knots, bucket_count, shape, random);
        const std::string name = std::to_string(knots) + " knots, " + std::to_string(bucket_count) +
                                 " buckets, shape " + std::to_string(int(shape));
        const T last = maps.segments.back().start;
        std::vector<T> radii{T(0), T(1e-6), T(1e6), T(INFINITY)};
        for (const Segment<T>& piece : maps.segments) {
          radii.insert(radii.end(),
                       {piece.start, std::nextafter(piece.start, T(0)), std::nextafter(piece.start, T(1000))});
        }
        for (int32_t i = 0; i < 2000; ++i) radii.push_back(T(random.uniform(0, 1.2)) * last);
        for (const T radius : radii) check_map(maps, radius, name);
        CHECK(std::isnan(maps(T(NAN)).radius), "%s: a NaN radius must stay NaN", name.c_str());
      }
    }
  }
}

template <typename T>
void test_polar() {
  Random random(13);
  for (int32_t i = 0; i < 20000; ++i) {
    const double size = std::pow(10.0, random.uniform(-9, 3));
    const T a = T(random.uniform(-size, size)), b = T(random.uniform(-size, size));
    const long double exact_squared = (long double)a * a + (long double)b * b;
    const long double length = std::sqrt(exact_squared), radius = std::sqrt(exact_squared + kRadiusEps);
    const Polar<T> polar = to_polar(a, b);
    // Square, sum, root and quotient: five roundings at most, halved by the root.
    const double bound = 4 * epsilon<T>();
    CHECK(std::fabs(double(polar.radius - radius)) <= bound * double(radius), "radius of (%a, %a) is %a", double(a),
          double(b), double(polar.radius));
    CHECK(std::fabs(double(polar.cos - a / length)) <= bound && std::fabs(double(polar.sin - b / length)) <= bound,
          "direction of (%a, %a) is (%a, %a)", double(a), double(b), double(polar.cos), double(polar.sin));
    CHECK(std::fabs(double(polar.inverse_length * length - 1)) <= bound, "1/length of (%a, %a) is %a", double(a),
          double(b), double(polar.inverse_length));
  }
  const Polar<T> origin = to_polar(T(0), T(0));
  CHECK(origin.cos == T(1) && origin.sin == T(0) && origin.inverse_length == T(0), "the origin must have phase 0");
  CHECK(std::fabs(double(origin.radius) - 1e-6) <= 1e-6 * 2 * epsilon<T>(), "radius at the origin is %a",
        double(origin.radius));
  const Polar<T> nan = to_polar(T(NAN), T(1));
  CHECK(std::isnan(nan.radius) && std::isnan(nan.cos) && std::isnan(nan.sin), "NaN must stay NaN");
}

// Central differences of step h: truncation h^2 |f'''|/6, rounding 4 epsilon |f|/h. With |f'''| <= 10 |f|/length^2,
// h = 1e-5 length and f around length * slope the sum is below 1e-9 of slope |gradient|; 1e-7 leaves room for
// short blocks.
void test_map_backward() {
  Random random(14);
  const RadiusMaps<double> maps(1, 64, 16, KnotShape::even, random);
  const double last = maps.segments.back().start;
  int32_t compared = 0;
  for (int32_t i = 0; i < 5000; ++i) {
    const double length = random.uniform(0.001, 1.3) * last, angle = random.uniform(-3.2, 3.2), h = 1e-5 * length;
    const double a = length * std::cos(angle), b = length * std::sin(angle);
    const double grad_a = random.uniform(-1, 1), grad_b = random.uniform(-1, 1);
    const auto value = [&](double at_a, double at_b) {
      const double distance = std::hypot(at_a, at_b), radius = std::sqrt(distance * distance + kRadiusEps);
      return maps(radius).radius * (grad_a * at_a + grad_b * at_b) / distance;
    };
    const Polar<double> polar = to_polar(a, b);
    const Mapped<double> here = maps(polar.radius);
    if (maps(polar.radius + 2 * h).slope != here.slope || maps(polar.radius - 2 * h).slope != here.slope) continue;
    ++compared;
    double out_a = 0, out_b = 0;
    map_backward(polar, here, grad_a, grad_b, &out_a, &out_b);
    const double expected_a = (value(a + h, b) - value(a - h, b)) / (2 * h);
    const double expected_b = (value(a, b + h) - value(a, b - h)) / (2 * h);
    const double bound = 1e-7 * (here.slope + here.radius / length);
    CHECK(std::fabs(out_a - expected_a) <= bound && std::fabs(out_b - expected_b) <= bound,
          "gradient at length %g, angle %g is (%g, %g), differences give (%g, %g)", length, angle, out_a, out_b,
          expected_a, expected_b);
  }
  CHECK(compared > 4000, "only %d points lay clear of the knots", compared);
  double out_a = 1, out_b = 1;
  map_backward(to_polar(0.0, 0.0), Mapped<double>{1e-6, 2.0}, 1.0, 1.0, &out_a, &out_b);
  CHECK(out_a == 0 && out_b == 0, "the gradient at the origin must be zero, got (%g, %g)", out_a, out_b);
}

}  // namespace

void aniso_test::run_tests() {
  test_find_segment<float>();
  test_find_segment<double>();
  test_buckets<float>();
  test_buckets<double>();
  test_polar<float>();
  test_polar<double>();
  test_map_backward();
}
