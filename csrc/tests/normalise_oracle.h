// Normalise, calibrate, normalise in double, step by step, and its gradient by the chain rule (METHOD section 4):
//   n = |w|   u = w/n   h = u + g   e = h/|h|
// The kernels take |h| from sums of w instead (row_scales.h): relative error 3 epsilon (1 + |g|)^2/|h|^2, the
// `amplification`.
#pragma once

#include "expected.h"

namespace aniso_test {

class NormaliseOracle {
 public:
  // terms[j] = absolute terms of w[j]; shift may be empty
  NormaliseOracle(std::vector<double> w, std::vector<double> terms, const std::vector<double>& shift)
      : u_(std::move(w)), terms_(std::move(terms)), h_(u_.size()), shifted_(!shift.empty()) {
    const double norm = length(u_);
    inverse_ = 1 / std::fmax(norm, 1e-12);
    double lost = 0;  // error of the norm in epsilons: the terms, and one rounding per added square
    for (size_t j = 0; j < u_.size(); ++j) lost += std::fabs(u_[j]) * terms_[j] * inverse_ * inverse_;
    norm_roundings_ = lost + double(u_.size());
    for (size_t j = 0; j < u_.size(); ++j) {
      u_[j] *= inverse_;
      h_[j] = u_[j] + (shifted_ ? shift[j] : 0);
    }
    shift_length_ = length(shift);
    outer_ = shifted_ ? 1 / std::fmax(length(h_), 1e-12) : 1;
    amplification_ = 1 + (shifted_ ? 3 * (1 + shift_length_) * (1 + shift_length_) * outer_ * outer_ : 0);
  }

  Expected row(size_t j) const {
    const double value = h_[j] * outer_;
    const double own = terms_[j] * inverse_ + std::fabs(u_[j]) + std::fabs(h_[j] - u_[j]);
    const double scale = norm_roundings_ * amplification_ * (std::fabs(u_[j]) * outer_ + std::fabs(value));
    return {value, own * outer_ + scale};
  }

  // Gradient at w from the gradient at e.
  std::vector<Expected> backward(const std::vector<double>& grad) const {
    const size_t width = u_.size();
    double along_e = 0, size = length(grad);
    for (size_t j = 0; j < width; ++j) along_e += grad[j] * h_[j] * outer_;
    std::vector<double> at_h(grad);
    for (size_t j = 0; shifted_ && j < width; ++j) at_h[j] = outer_ * (grad[j] - h_[j] * outer_ * along_e);
    double along_u = 0;
    for (size_t j = 0; j < width; ++j) along_u += at_h[j] * u_[j];
    std::vector<Expected> result(width);
    for (size_t j = 0; j < width; ++j) {
      const double parts =
          std::fabs(grad[j]) + size * (std::fabs(u_[j]) + std::fabs(h_[j]) * outer_ + terms_[j] * inverse_);
      result[j] = {inverse_ * (at_h[j] - u_[j] * along_u),
                   inverse_ * outer_ * amplification_ * norm_roundings_ * (1 + shift_length_) * parts};
    }
    return result;
  }

 private:
  static double length(const std::vector<double>& values) {
    double squares = 0;
    for (const double value : values) squares += value * value;
    return std::sqrt(squares);
  }

  std::vector<double> u_, terms_, h_;
  bool shifted_;
  double inverse_, norm_roundings_, shift_length_, outer_, amplification_;
};

}  // namespace aniso_test
