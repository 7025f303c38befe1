// Constants of an initialisation and its blocks in double, straight from METHOD section 4: a search through all knots,
// hypot for lengths, gradients from the derivatives of radius and phase.
#pragma once

#include <string>

#include "aniso/row_kernels.h"
#include "expected.h"
#include "knots.h"

namespace aniso_test {

enum class Complement { scalar, diagonal, projected };

struct Shape {
  int64_t rows;
  int32_t width;
  int32_t rank;
  int32_t knots;
  int32_t bucket_count;
  Complement complement;
  bool shifted;

  int32_t rank_in() const { return complement == Complement::projected ? 2 * rank : rank; }
  int32_t rank_out() const { return complement == Complement::scalar ? rank : 2 * rank; }
  std::string text() const {
    static const char* const names[] = {"scalar", "diagonal", "diagonal_projected"};
    return "N=" + std::to_string(rows) + " D=" + std::to_string(width) + " R=" + std::to_string(rank) +
           " K=" + std::to_string(knots) + " " + names[int(complement)] + (shifted ? " calibrated" : "");
  }
};

template <typename P>
struct Constants {
  using T = typename aniso::Working<P>::type;

  Constants(const Shape& shape, Random& random)
      : input_bias(random_values<T>(shape.rank_in(), -0.2, 0.2, random)),
        target_coordinates(random_values<T>(shape.rank, -0.2, 0.2, random)),
        scale(random_values<T>(shape.width, 0.3, 2, random)),
        offset(random_values<T>(shape.width, -0.2, 0.2, random)),
        shift(random_values<T>(shape.width, -0.3 / std::sqrt(shape.width), 0.3 / std::sqrt(shape.width), random)),
        maps(shape.rank / 2, shape.knots, shape.bucket_count, KnotShape::even, random) {
    if (shape.complement == Complement::scalar) scale.assign(size_t(shape.width), scale[0]);
    // Values that every format holds exactly, so that the first block of a row can be put at the origin.
    for (int32_t c = 0; c < 2; ++c) input_bias[size_t(c)] = T(0.125), target_coordinates[size_t(c)] = T(0.0625);
    init.width = shape.width;
    init.rank = shape.rank;
    init.rank_in = shape.rank_in();
    init.rank_out = shape.rank_out();
    init.pieces = shape.knots + 1;
    init.bucket_count = shape.bucket_count;
    init.scalar = scale[0];
    init.input_bias = input_bias.data();
    init.target_coordinates = target_coordinates.data();
    init.segments = maps.segments.data();
    init.buckets = maps.buckets.data();
    init.windows = maps.windows.data();
    init.scale = scale.data();
    init.offset = offset.data();
    init.shift = shape.shifted ? shift.data() : nullptr;
  }
  Constants(const Constants&) = delete;

  T origin(int32_t c) const { return -(input_bias[size_t(c)] + target_coordinates[size_t(c)]); }

  std::vector<T> input_bias, target_coordinates, scale, offset, shift;
  RadiusMaps<T> maps;
  aniso::Initialisation<T> init{};
};

// One block of one row.
class BlockOracle {
 public:
  // Coordinates with the terms of their sums, p of `diagonal_projected`, and the scalar of `scalar` (else 0).
  BlockOracle(const Expected (&centred)[2], const Expected (&leak)[2], const double (&target)[2], double scalar,
              double rounding)
      : centred_{centred[0], centred[1]}, leak_{leak[0], leak[1]}, scalar_(scalar) {
    const double a = centred[0].value + target[0], b = centred[1].value + target[1];
    length_ = std::hypot(a, b);
    radius_ = std::hypot(length_, 1e-6);
    cos_ = length_ > 0 ? a / length_ : 1;
    sin_ = length_ > 0 ? b / length_ : 0;
    terms_ = centred[0].terms + centred[1].terms + std::fabs(target[0]) + std::fabs(target[1]);
    // error of the direction per epsilon: exact sums at the origin leave none
    turn_ = length_ > 0 ? terms_ / length_ : 0;
    radius_error_ = rounding * (terms_ + radius_);
  }

  double radius() const { return radius_; }
  double radius_error() const { return radius_error_; }
  void set_map(double mapped, double slope, double map_terms, bool near_knot) {
    mapped_ = mapped;
    slope_ = slope;
    map_terms_ = map_terms + slope * (terms_ + radius_);
    near_knot_ = near_knot;
  }
  bool near_knot() const { return near_knot_; }
  double turn() const { return turn_; }

  Expected centred(int32_t c) const { return centred_[c]; }
  Expected cosine() const { return {cos_, 1 + turn_}; }
  Expected sine() const { return {sin_, 1 + turn_}; }
  Expected log_radius() const { return {std::log(mapped_), map_terms_ / mapped_ + std::fabs(std::log(mapped_)) + 1}; }

  // k of the module's table in operands.py, with c^ (correct) or without it (encode).
  Expected coefficient(int32_t c, bool mapped) const {
    const double part = mapped ? mapped_ * (c == 0 ? cos_ : sin_) : 0;
    const double part_terms = mapped ? map_terms_ + mapped_ * (1 + turn_) : 0;
    return {part - scalar_ * centred_[c].value - leak_[c].value,
            part_terms + scalar_ * centred_[c].terms + leak_[c].terms};
  }

  // Of T(rho)(cos, sin) to (a, b): d rho = length/rho along the block, d theta = 1/length across it.
  Expected map_gradient(double grad_a, double grad_b, int32_t c) const {
    const double radial = (grad_a * cos_ + grad_b * sin_) * slope_ * length_ / radius_;
    const double tangential = length_ > 0 ? (grad_b * cos_ - grad_a * sin_) * mapped_ / length_ : 0;
    return combined(radial, tangential, c, (std::fabs(grad_a) + std::fabs(grad_b)) * stretch());
  }

  // Of (sin, cos, log T(rho)).
  Expected polar_gradient(double grad_sin, double grad_cos, double grad_log, int32_t c) const {
    const double radial = grad_log * slope_ / mapped_ * length_ / radius_;
    const double tangential = length_ > 0 ? (grad_sin * cos_ - grad_cos * sin_) / length_ : 0;
    const double sizes = std::fabs(grad_sin) + std::fabs(grad_cos) + std::fabs(grad_log) * map_terms_ / mapped_;
    return combined(radial, tangential, c, sizes * stretch() / mapped_);
  }

 private:
  double stretch() const { return slope_ + (length_ > 0 ? (map_terms_ + mapped_) / length_ : 0); }
  Expected combined(double radial, double tangential, int32_t c, double terms) const {
    return {c == 0 ? cos_ * radial - sin_ * tangential : sin_ * radial + cos_ * tangential, terms * (1 + 4 * turn_)};
  }

  Expected centred_[2], leak_[2];
  double scalar_, length_, radius_, cos_, sin_, terms_, turn_, radius_error_;
  double mapped_ = 0, slope_ = 0, map_terms_ = 0;
  bool near_knot_ = false;
};

template <typename P>
class InitialiseOracle {
 public:
  explicit InitialiseOracle(const Constants<P>& constants) : init_(constants.init) {}

  // From the projections as a kernel receives them.
  BlockOracle block(const typename aniso::Working<P>::type* projected, int32_t block) const {
    std::vector<double> values;
    for (int32_t r = 0; r < init_.rank_in; ++r) values.push_back(exact(projected[r]));
    return this->block(values, values, block);
  }

  // From exact projections, with the terms of their sums.
  BlockOracle block(const std::vector<double>& projected, const std::vector<double>& terms, int32_t block) const {
    const auto sum = [&](int32_t column) -> Expected {
      const double bias = double(init_.input_bias[column]);
      return {projected[size_t(column)] + bias, std::fabs(terms[size_t(column)]) + std::fabs(bias)};
    };
    const int32_t column = 2 * block;
    const bool projected_leak = init_.rank_in != init_.rank;
    const Expected none{0, 0};
    const Expected centred[2] = {sum(column), sum(column + 1)};
    const Expected leak[2] = {projected_leak ? sum(init_.rank + column) : none,
                              projected_leak ? sum(init_.rank + column + 1) : none};
    const double target[2] = {double(init_.target_coordinates[column]), double(init_.target_coordinates[column + 1])};
    const double scalar = init_.rank_out == init_.rank ? double(init_.scalar) : 0;
    BlockOracle result(centred, leak, target, scalar, 4 * epsilon<typename aniso::Working<P>::type>());
    map(block, result);
    return result;
  }

 private:
  void map(int32_t block, BlockOracle& result) const {
    const auto* pieces = init_.segments + int64_t(block) * init_.pieces;
    const double radius = result.radius();
    int32_t piece = 0;
    bool near = false;
    for (int32_t i = 1; i < init_.pieces; ++i) {
      const double knot = double(pieces[i].start);
      if (knot <= radius) piece = i;
      near = near || std::fabs(knot - radius) <= result.radius_error();
    }
    const double start = double(pieces[piece].start), value = double(pieces[piece].value);
    const double slope = double(pieces[piece].slope);
    result.set_map(value + (radius - start) * slope, slope, std::fabs(value) + start * slope, near);
  }

  aniso::Initialisation<typename aniso::Working<P>::type> init_;
};

}  // namespace aniso_test
