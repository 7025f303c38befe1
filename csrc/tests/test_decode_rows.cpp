// The kernels of `decode` against METHOD section 4 in double: theta^ = theta0 + a_theta tanh(dtheta),
// rho^ = rho0 exp(a_rho tanh(drho)), v^ = v0 + step - (the part of the step in U), e = Norm(...), and
// their derivatives.
#include <string>

#include "aniso/row_kernels.h"
#include "normalise_oracle.h"

using namespace aniso;
using namespace aniso_test;

namespace {

// exp (2 ulp, and its argument's error), tanh (3), sin and cos (2 each), and a dozen products and sums.
constexpr double kTurnRoundings = 24;
constexpr double kRowRoundings = 4;

struct Shape {
  int64_t rows;
  int32_t width;
  int32_t rank;
  bool project;
  bool shifted;

  int32_t blocks() const { return rank / 2; }
  int64_t state_columns() const { return 3 * blocks() + width; }
  int64_t delta_columns() const { return rank + width; }
  std::string text() const {
    return "N=" + std::to_string(rows) + " D=" + std::to_string(width) + " R=" + std::to_string(rank) +
           (project ? " projected" : "") + (shifted ? " calibrated" : "");
  }
};

// One block after its bounded update.
struct TurnOracle {
  double sin0, cos0, turned, stretched, angle, radius;

  template <typename P, typename T>
  TurnOracle(const Update<T>& update, const P* state, const P* deltas, int32_t block) {
    const int32_t blocks = update.rank / 2;
    sin0 = exact(state[block]);
    cos0 = exact(state[blocks + block]);
    turned = std::tanh(exact(deltas[block]));
    stretched = std::tanh(exact(deltas[blocks + block]));
    angle = double(update.a_theta) * turned;
    log_radius_ = std::fabs(exact(state[2 * blocks + block])) + double(update.a_rho) * std::fabs(stretched);
    radius = std::exp(exact(state[2 * blocks + block]) + double(update.a_rho) * stretched);
  }

  // The state need not be on the circle: (cos, sin) turn as a vector.
  double cos() const { return cos0 * std::cos(angle) - sin0 * std::sin(angle); }
  double sin() const { return sin0 * std::cos(angle) + cos0 * std::sin(angle); }
  double size() const { return std::fabs(cos0) + std::fabs(sin0); }
  double terms() const { return radius * (1 + log_radius_); }

 private:
  double log_radius_;
};

template <typename S, typename P>
class Suite {
 public:
  using T = typename Working<P>::type;

  Suite(const Shape& shape, Random& random)
      : shape_(shape),
        name_(std::string(Format<S>::kName) + "/" + Format<P>::kName + " " + shape.text()),
        shift_(random_values<T>(shape.width, -0.3 / std::sqrt(shape.width), 0.3 / std::sqrt(shape.width), random)),
        update_{
            shape.width, shape.rank, T(0.7), T(0.4), T(0.3), shape.project, shape.shifted ? shift_.data() : nullptr},
        state_(random_values<P>(shape.rows * shape.state_columns(), -1, 1, random)),
        deltas_(random_values<P>(shape.rows * shape.delta_columns(), -3, 3, random)),
        step_(random_values<P>(shape.rows * shape.width, -0.3, 0.3, random)),
        rebuilt_(random_values<P>(shape.rows * shape.width, -0.3, 0.3, random)),
        grad_(random_values<P>(shape.rows * shape.width, -1, 1, random)),
        leak_(random_values<P>(shape.rows * shape.width, -1, 1, random)),
        coefficients_(random_values<P>(shape.rows * shape.rank, -1, 1, random)) {}

  void run() {
    decode_step();
    decode_map();
    decode_finish();
    decode_finish_backward();
    decode_backward();
  }

 private:
  const RowKernels<S, P>& kernels() const { return row_kernels<S, P>(); }
  std::string what(const char* kernel) const { return std::string(kernel) + " " + name_; }

  template <typename Out, typename Write>
  Guarded<Out> written(const std::string& label, int64_t columns, std::vector<P>& input, const Write& write) {
    Guarded<Out> clean(shape_.rows * columns), poisoned(shape_.rows * columns);
    write(clean.data());
    CHECK(clean.intact(), "%s: wrote outside its rows", label.c_str());
    if (shape_.rows == 0) return clean;
    const int64_t row = shape_.rows / 2, stride = int64_t(input.size()) / shape_.rows;
    const std::vector<P> kept(input);
    for (int64_t j = 0; j < stride; ++j) input[size_t(row * stride + j)] = narrow<P>(T(NAN));
    write(poisoned.data());
    input = kept;
    check_isolated(clean, poisoned, shape_.rows, row, label.c_str());
    return clean;
  }

  void decode_step() {
    const std::string label = what("decode_step");
    Guarded<P> out = written<P>(label, shape_.width, deltas_, [&](P* result) {
      kernels().decode_step(update_, shape_.rows, deltas_.data(), result);
    });
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t row = i / shape_.width, column = i % shape_.width;
      const double move = exact(deltas_[size_t(row * shape_.delta_columns() + shape_.rank + column)]);
      const double value = double(update_.a_v) * std::tanh(move);
      const Expected expected{value, std::fabs(value)};
      CHECK_EXPECTED(out[i], expected, 8, label, row, column);
    }
  }

  const P* projected_step() const { return shape_.project ? coefficients_.data() : nullptr; }

  void decode_map() {
    const std::string label = what("decode_map");
    Guarded<P> out = written<P>(label, shape_.rank, state_, [&](P* result) {
      kernels().decode_map(update_, shape_.rows, state_.data(), deltas_.data(), projected_step(), result);
    });
    for (int64_t i = 0; i < shape_.rows; ++i) {
      for (int32_t block = 0; block < shape_.blocks(); ++block) {
        const TurnOracle t = turn(i, block);
        for (int32_t c = 0; c < 2; ++c) {
          const double taken = shape_.project ? exact(coefficients_[size_t(i * shape_.rank + 2 * block + c)]) : 0;
          const Expected expected{t.radius * (c == 0 ? t.cos() : t.sin()) - taken,
                                  t.terms() * t.size() + std::fabs(taken)};
          CHECK_EXPECTED(out[i * shape_.rank + 2 * block + c], expected, kTurnRoundings, label, i, 2 * block + c);
        }
      }
    }
  }

  TurnOracle turn(int64_t row, int32_t block) const {
    return TurnOracle(update_, state_.data() + row * shape_.state_columns(),
                      deltas_.data() + row * shape_.delta_columns(), block);
  }

  NormaliseOracle normalise_oracle(int64_t i) const {
    std::vector<double> w, terms, shift;
    for (int64_t j = 0; j < shape_.width; ++j) {
      const double a = exact(rebuilt_[size_t(i * shape_.width + j)]), c = exact(step_[size_t(i * shape_.width + j)]);
      const double b = exact(state_[size_t(i * shape_.state_columns() + 3 * shape_.blocks() + j)]);
      w.push_back(a + b + c);
      terms.push_back(2 * (std::fabs(a) + std::fabs(b) + std::fabs(c)));
      if (shape_.shifted) shift.push_back(double(shift_[size_t(j)]));
    }
    return NormaliseOracle(w, terms, shift);
  }

  void decode_finish() {
    const std::string label = what("decode_finish");
    Guarded<T> scratch(shape_.width);
    Guarded<S> out = written<S>(label, shape_.width, step_, [&](S* result) {
      kernels().decode_finish(update_, shape_.rows, rebuilt_.data(), state_.data(), step_.data(), scratch.data(),
                              result);
    });
    CHECK(scratch.intact(), "%s: wrote outside its scratch", label.c_str());
    for (int64_t i = 0; i < shape_.rows; ++i) {
      const NormaliseOracle oracle = normalise_oracle(i);
      for (int32_t j = 0; j < shape_.width; ++j) {
        CHECK_EXPECTED(out[i * shape_.width + j], oracle.row(size_t(j)), kRowRoundings, label, i, j);
      }
    }
  }

  void decode_finish_backward() {
    const std::string label = what("decode_finish_backward");
    Guarded<T> scratch(shape_.width);
    Guarded<P> out = written<P>(label, shape_.width, grad_, [&](P* result) {
      kernels().decode_finish_backward(update_, shape_.rows, rebuilt_.data(), state_.data(), step_.data(), grad_.data(),
                                       scratch.data(), result);
    });
    for (int64_t i = 0; i < shape_.rows; ++i) {
      std::vector<double> grad;
      for (int64_t j = 0; j < shape_.width; ++j) grad.push_back(exact(grad_[size_t(i * shape_.width + j)]));
      const std::vector<Expected> expected = normalise_oracle(i).backward(grad);
      for (int32_t j = 0; j < shape_.width; ++j) {
        CHECK_EXPECTED(out[i * shape_.width + j], expected[size_t(j)], kRowRoundings, label, i, j);
      }
    }
  }

  void decode_backward() {
    const std::string label = what("decode_backward");
    const P* leak = shape_.project ? leak_.data() : nullptr;
    Guarded<S> grad_state(shape_.rows * shape_.state_columns());
    Guarded<S> grad_deltas = written<S>(label, shape_.delta_columns(), deltas_, [&](S* result) {
      kernels().decode_backward(update_, shape_.rows, state_.data(), deltas_.data(), coefficients_.data(), grad_.data(),
                                leak, grad_state.data(), result);
    });
    kernels().decode_backward(update_, shape_.rows, state_.data(), deltas_.data(), coefficients_.data(), grad_.data(),
                              leak, grad_state.data(), grad_deltas.data());
    CHECK(grad_state.intact(), "%s: wrote outside the gradient of the state", label.c_str());
    for (int64_t i = 0; i < shape_.rows; ++i) {
      for (int32_t block = 0; block < shape_.blocks(); ++block) {
        check_block(label, i, block, grad_state.data() + i * shape_.state_columns(),
                    grad_deltas.data() + i * shape_.delta_columns());
      }
      for (int32_t j = 0; j < shape_.width; ++j) {
        const double grad = exact(grad_[size_t(i * shape_.width + j)]);
        const double lost = shape_.project ? exact(leak_[size_t(i * shape_.width + j)]) : 0;
        const double tanh = std::tanh(exact(deltas_[size_t(i * shape_.delta_columns() + shape_.rank + j)]));
        const Expected state{grad, 0};
        CHECK_EXPECTED(grad_state[i * shape_.state_columns() + 3 * shape_.blocks() + j], state, 1, label, i, j);
        // 1 - tanh^2 cancels: its error is that of tanh^2
        const double a_v = double(update_.a_v);
        const Expected move{a_v * (1 - tanh * tanh) * (grad - lost), a_v * (std::fabs(grad) + std::fabs(lost))};
        CHECK_EXPECTED(grad_deltas[i * shape_.delta_columns() + shape_.rank + j], move, kTurnRoundings, label, i, j);
      }
    }
  }

  // c^ = rho^ (cos0 cos d - sin0 sin d, sin0 cos d + cos0 sin d), d = a_theta tanh(dtheta), log rho^ = log rho0 + ...
  void check_block(const std::string& label, int64_t i, int32_t block, const S* grad_state,
                   const S* grad_deltas) const {
    const int32_t blocks = shape_.blocks();
    const TurnOracle t = turn(i, block);
    const double a = exact(coefficients_[size_t(i * shape_.rank + 2 * block)]);
    const double b = exact(coefficients_[size_t(i * shape_.rank + 2 * block + 1)]);
    const double terms = t.terms() * (std::fabs(a) + std::fabs(b)) * (1 + t.size());
    const Expected sine{t.radius * (b * std::cos(t.angle) - a * std::sin(t.angle)), terms};
    const Expected cosine{t.radius * (a * std::cos(t.angle) + b * std::sin(t.angle)), terms};
    const Expected log_radius{t.radius * (a * t.cos() + b * t.sin()), terms};
    const double a_theta = double(update_.a_theta), a_rho = double(update_.a_rho);
    const Expected turned{a_theta * (1 - t.turned * t.turned) * t.radius * (b * t.cos() - a * t.sin()),
                          a_theta * terms};
    const Expected stretched{a_rho * (1 - t.stretched * t.stretched) * log_radius.value, a_rho * terms};
    CHECK_EXPECTED(grad_state[block], sine, kTurnRoundings, label, i, block);
    CHECK_EXPECTED(grad_state[blocks + block], cosine, kTurnRoundings, label, i, blocks + block);
    CHECK_EXPECTED(grad_state[2 * blocks + block], log_radius, kTurnRoundings, label, i, 2 * blocks + block);
    CHECK_EXPECTED(grad_deltas[block], turned, kTurnRoundings, label, i, block);
    CHECK_EXPECTED(grad_deltas[blocks + block], stretched, kTurnRoundings, label, i, blocks + block);
  }

  Shape shape_;
  std::string name_;
  std::vector<T> shift_;
  Update<T> update_;
  std::vector<P> state_, deltas_, step_, rebuilt_, grad_, leak_, coefficients_;
};

template <typename S, typename P>
void test_formats() {
  Random random(31);
  for (const bool project : {false, true}) {
    for (const bool shifted : {false, true}) {
      Suite<S, P>({0, 8, 4, project, shifted}, random).run();
      Suite<S, P>({1, 2, 2, project, shifted}, random).run();
      Suite<S, P>({31, 7, 6, project, shifted}, random).run();
      Suite<S, P>({70, 33, 32, project, shifted}, random).run();
      Suite<S, P>({300, 130, 18, project, shifted}, random).run();
    }
  }
}

}  // namespace

void aniso_test::run_tests() {
  test_formats<double, double>();
  test_formats<float, float>();
  test_formats<Float16, float>();
  test_formats<BFloat16, float>();
  test_formats<BFloat16, BFloat16>();
}
