// The kernels of `correct` and `encode` against METHOD section 4 in double, for every pair of formats, the three
// complements, odd widths, and row counts that end inside a tile.
#include <string>

#include "aniso/row_kernels.h"
#include "initialise_oracle.h"
#include "normalise_oracle.h"

using namespace aniso;
using namespace aniso_test;

namespace {

// Terms already hold the condition of each step; these count the steps: load, bias, target, square, sum, root,
// quotient, product, search, slope, value, final sums.
constexpr double kMapRoundings = 16;
constexpr double kRowRoundings = 4;

template <typename S, typename P>
class Suite {
 public:
  using T = typename Working<P>::type;

  Suite(const Shape& shape, Random& random)
      : shape_(shape),
        constants_(shape, random),
        oracle_(constants_),
        name_(std::string(Format<S>::kName) + "/" + Format<P>::kName + " " + shape.text()),
        projected_(random_values<T>(shape.rows * shape.rank_in(), -0.3, 0.3, random)),
        rebuilt_(random_values<P>(shape.rows * shape.width, -0.3, 0.3, random)),
        y_(random_values<P>(shape.rows * shape.width, -0.3, 0.3, random)),
        grad_rows_(random_values<P>(shape.rows * shape.width, -1, 1, random)),
        grad_coefficients_(random_values<P>(shape.rows * shape.rank_out(), -1, 1, random)),
        grad_polar_(random_values<P>(shape.rows * polar_stride(), -1, 1, random)) {
    if (shape.rows > 1) {  // a row whose first block sits at the origin, exactly where the formats allow it
      for (int32_t c = 0; c < 2; ++c) projected_[size_t(shape.rank_in() + c)] = constants_.origin(c);
    }
  }

  void run() {
    correct_map();
    correct_finish();
    correct_finish_backward();
    correct_map_backward();
    add_scaled();
    encode_map();
    encode_finish();
    encode_map_backward();
  }

 private:
  int64_t polar_stride() const { return shape_.rank / 2 * 3 + shape_.width; }
  const RowKernels<S, P>& kernels() const { return row_kernels<S, P>(); }
  const Initialisation<T>& init() const { return constants_.init; }
  std::string what(const char* kernel) const { return std::string(kernel) + " " + name_; }

  // Writes with the inputs as they are, and again with a NaN in one row of `input`; returns the first.
  template <typename Out, typename In, typename Write>
  Guarded<Out> written(const std::string& label, int64_t columns, std::vector<In>& input, const Write& write) {
    Guarded<Out> clean(shape_.rows * columns), poisoned(shape_.rows * columns);
    write(clean.data());
    CHECK(clean.intact(), "%s: wrote outside its rows", label.c_str());
    if (shape_.rows == 0) return clean;
    const int64_t row = shape_.rows / 2, stride = int64_t(input.size()) / shape_.rows;
    std::vector<In> kept(input);
    for (int64_t j = 0; j < stride; ++j) input[size_t(row * stride + j)] = narrow<In>(T(NAN));
    write(poisoned.data());
    input = kept;
    check_isolated(clean, poisoned, shape_.rows, row, label.c_str());
    return clean;
  }

  void correct_map() {
    const std::string label = what("correct_map");
    Guarded<P> out = written<P>(label, shape_.rank_out(), projected_, [&](P* result) {
      kernels().correct_map(init(), shape_.rows, projected_.data(), result);
    });
    for_each_block([&](int64_t i, int32_t block, const BlockOracle& b) {
      for (int32_t c = 0; c < 2; ++c) {
        const int32_t column = 2 * block + c;
        CHECK_EXPECTED(out[i * shape_.rank_out() + column], b.coefficient(c, true), kMapRoundings, label, i, column);
        if (shape_.complement == Complement::scalar) continue;
        const int32_t second = shape_.rank + column;
        CHECK_EXPECTED(out[i * shape_.rank_out() + second], b.centred(c), kMapRoundings, label, i, second);
      }
    });
  }

  void encode_map() {
    const std::string label = what("encode_map");
    const int32_t blocks = shape_.rank / 2;
    const int64_t stride = polar_stride();
    Guarded<P> coefficients(shape_.rows * shape_.rank_out());
    Guarded<S> whole(shape_.rows * stride);
    kernels().encode_map(init(), shape_.rows, projected_.data(), coefficients.data(), whole.data());
    CHECK(whole.intact() && coefficients.intact(), "%s: wrote outside its rows", label.c_str());
    for_each_block([&](int64_t i, int32_t block, const BlockOracle& b) {
      CHECK_EXPECTED(whole[i * stride + block], b.sine(), kMapRoundings, label, i, block);
      CHECK_EXPECTED(whole[i * stride + blocks + block], b.cosine(), kMapRoundings, label, i, blocks + block);
      CHECK_EXPECTED(whole[i * stride + 2 * blocks + block], b.log_radius(), kMapRoundings, label, i,
                     2 * blocks + block);
      for (int32_t c = 0; c < 2; ++c) {
        const int32_t column = 2 * block + c;
        CHECK_EXPECTED(coefficients[i * shape_.rank_out() + column], b.coefficient(c, false), kMapRoundings, label, i,
                       column);
      }
    });
    for (int64_t i = 0; i < shape_.rows; ++i) {
      for (int64_t j = 3 * blocks; j < stride; ++j) {
        CHECK(std::isnan(exact(whole[i * stride + j])), "%s: wrote into v0, row %d", label.c_str(), int(i));
      }
    }
  }

  std::vector<double> row_values(const std::vector<P>& rows, int64_t i) const {
    std::vector<double> values;
    for (int64_t j = 0; j < shape_.width; ++j) values.push_back(exact(rows[size_t(i * shape_.width + j)]));
    return values;
  }

  // w = rebuilt + scale * y + offset, with its absolute terms.
  void unnormalised(int64_t i, std::vector<double>& w, std::vector<double>& terms) const {
    for (int64_t j = 0; j < shape_.width; ++j) {
      const double a = exact(rebuilt_[size_t(i * shape_.width + j)]), scale = double(constants_.scale[size_t(j)]);
      const double b = scale * exact(y_[size_t(i * shape_.width + j)]), c = double(constants_.offset[size_t(j)]);
      w.push_back(a + b + c);
      terms.push_back(2 * (std::fabs(a) + std::fabs(b) + std::fabs(c)));
    }
  }

  NormaliseOracle normalise_oracle(int64_t i) const {
    std::vector<double> w, terms, shift;
    unnormalised(i, w, terms);
    for (size_t j = 0; shape_.shifted && j < constants_.shift.size(); ++j) shift.push_back(double(constants_.shift[j]));
    return NormaliseOracle(w, terms, shift);
  }

  void correct_finish() {
    const std::string label = what("correct_finish");
    Guarded<T> scratch(shape_.width);
    Guarded<S> out = written<S>(label, shape_.width, y_, [&](S* result) {
      kernels().correct_finish(init(), shape_.rows, rebuilt_.data(), y_.data(), scratch.data(), result);
    });
    CHECK(scratch.intact(), "%s: wrote outside its scratch", label.c_str());
    for (int64_t i = 0; i < shape_.rows; ++i) {
      const NormaliseOracle oracle = normalise_oracle(i);
      for (int32_t j = 0; j < shape_.width; ++j) {
        CHECK_EXPECTED(out[i * shape_.width + j], oracle.row(size_t(j)), kRowRoundings, label, i, j);
      }
    }
  }

  void correct_finish_backward() {
    const std::string label = what("correct_finish_backward");
    Guarded<T> scratch(shape_.width);
    Guarded<P> out = written<P>(label, shape_.width, grad_rows_, [&](P* result) {
      kernels().correct_finish_backward(init(), shape_.rows, rebuilt_.data(), y_.data(), grad_rows_.data(),
                                        scratch.data(), result);
    });
    for (int64_t i = 0; i < shape_.rows; ++i) {
      const std::vector<Expected> expected = normalise_oracle(i).backward(row_values(grad_rows_, i));
      for (int32_t j = 0; j < shape_.width; ++j) {
        CHECK_EXPECTED(out[i * shape_.width + j], expected[size_t(j)], kRowRoundings, label, i, j);
      }
    }
  }

  void encode_finish() {
    const std::string label = what("encode_finish");
    const int64_t stride = polar_stride(), first = stride - shape_.width;
    Guarded<S> out = written<S>(label, stride, y_, [&](S* result) {
      kernels().encode_finish(init(), shape_.rows, rebuilt_.data(), y_.data(), result);
    });
    for (int64_t i = 0; i < shape_.rows; ++i) {
      std::vector<double> w, terms;
      unnormalised(i, w, terms);
      for (int64_t j = 0; j < stride; ++j) {
        if (j < first) {
          CHECK(std::isnan(exact(out[i * stride + j])), "%s: wrote before v0, row %d", label.c_str(), int(i));
          continue;
        }
        const Expected expected{w[size_t(j - first)], terms[size_t(j - first)]};
        CHECK_EXPECTED(out[i * stride + j], expected, kRowRoundings, label, i, j);
      }
    }
  }

  void add_scaled() {
    const std::string label = what("add_scaled");
    std::vector<T> projected_back;
    for (const P value : rebuilt_) projected_back.push_back(widen(value));
    Guarded<S> out = written<S>(label, shape_.width, grad_rows_, [&](S* result) {
      kernels().add_scaled(init(), shape_.rows, projected_back.data(), grad_rows_.data(), result);
    });
    for (int64_t i = 0; i < out.size(); ++i) {
      const double a = exact(rebuilt_[size_t(i)]);
      const double b = double(constants_.scale[size_t(i % shape_.width)]) * exact(grad_rows_[size_t(i)]);
      const Expected expected{a + b, std::fabs(a) + std::fabs(b)};
      CHECK_EXPECTED(out[i], expected, kRowRoundings, label, i / shape_.width, i % shape_.width);
    }
  }

  // What reaches the projections from the gradients at the coefficients and, through the map, at the blocks.
  template <typename Through>
  void check_projected_gradient(const std::string& label, Guarded<T>& out, const Through& through) {
    int64_t skipped = 0, blocks = 0;
    for_each_block([&](int64_t i, int32_t block, const BlockOracle& b) {
      ++blocks;
      if (b.near_knot()) {  // the slope there depends on the last bit of the radius
        ++skipped;
        return;
      }
      const P* grad = grad_coefficients_.data() + i * shape_.rank_out();
      for (int32_t c = 0; c < 2; ++c) {
        const int32_t column = 2 * block + c;
        Expected expected = through(i, block, b, c);
        const double direct = shape_.complement == Complement::scalar ? -double(init().scalar) * exact(grad[column])
                                                                      : exact(grad[shape_.rank + column]);
        expected.value += direct;
        expected.terms += std::fabs(direct);
        CHECK_EXPECTED(out[i * shape_.rank_in() + column], expected, kMapRoundings, label, i, column);
        if (shape_.rank_in() == shape_.rank) continue;
        const Expected leak{-exact(grad[column]), 0};
        CHECK_EXPECTED(out[i * shape_.rank_in() + shape_.rank + column], leak, kMapRoundings, label, i,
                       shape_.rank + column);
      }
    });
    CHECK(10 * skipped <= blocks, "%s: %d of %d blocks lie near knots", label.c_str(), int(skipped), int(blocks));
  }

  void correct_map_backward() {
    const std::string label = what("correct_map_backward");
    Guarded<T> out = written<T>(label, shape_.rank_in(), grad_coefficients_, [&](T* result) {
      kernels().correct_map_backward(init(), shape_.rows, projected_.data(), grad_coefficients_.data(), result);
    });
    check_projected_gradient(label, out, [&](int64_t i, int32_t block, const BlockOracle& b, int32_t c) {
      const P* grad = grad_coefficients_.data() + i * shape_.rank_out() + 2 * block;
      return b.map_gradient(exact(grad[0]), exact(grad[1]), c);
    });
  }

  void encode_map_backward() {
    const std::string label = what("encode_map_backward");
    const int32_t blocks = shape_.rank / 2;
    const int64_t stride = polar_stride();
    Guarded<T> out = written<T>(label, shape_.rank_in(), grad_polar_, [&](T* result) {
      kernels().encode_map_backward(init(), shape_.rows, projected_.data(), grad_polar_.data(), stride,
                                    grad_coefficients_.data(), result);
    });
    check_projected_gradient(label, out, [&](int64_t i, int32_t block, const BlockOracle& b, int32_t c) {
      const P* grad = grad_polar_.data() + i * stride + block;
      return b.polar_gradient(exact(grad[0]), exact(grad[blocks]), exact(grad[2 * blocks]), c);
    });
  }

  template <typename Visit>
  void for_each_block(const Visit& visit) {
    for (int64_t i = 0; i < shape_.rows; ++i) {
      for (int32_t block = 0; block < shape_.rank / 2; ++block) {
        visit(i, block, oracle_.block(projected_.data() + i * shape_.rank_in(), block));
      }
    }
  }

  Shape shape_;
  Constants<P> constants_;
  InitialiseOracle<P> oracle_;
  std::string name_;
  std::vector<T> projected_;
  std::vector<P> rebuilt_, y_, grad_rows_, grad_coefficients_, grad_polar_;
};

template <typename S, typename P>
void test_load() {
  Random random(21);
  for (const int64_t column_stride : {1, 3}) {
    for (const int64_t columns : {1, 7, 33, 130}) {
      const int64_t rows = 5, row_stride = columns * column_stride + 2;
      const std::vector<S> source = random_values<S>(rows * row_stride, -2, 2, random);
      Guarded<P> chunk(rows * columns);
      row_kernels<S, P>().load(source.data(), row_stride, column_stride, rows, columns, chunk.data());
      CHECK(chunk.intact(), "load %s/%s: wrote outside its chunk", Format<S>::kName, Format<P>::kName);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const double expected = exact(source[size_t(i * row_stride + j * column_stride)]);
          CHECK(exact(chunk[i * columns + j]) == expected, "load %s/%s: row %d column %d is %a, expected %a",
                Format<S>::kName, Format<P>::kName, int(i), int(j), exact(chunk[i * columns + j]), expected);
        }
      }
    }
  }
}

template <typename S, typename P>
void test_formats() {
  test_load<S, P>();
  Random random(22);
  for (const Complement complement : {Complement::scalar, Complement::diagonal, Complement::projected}) {
    for (const bool shifted : {false, true}) {
      Suite<S, P>({0, 8, 4, 16, 8, complement, shifted}, random).run();
      Suite<S, P>({1, 2, 2, 2, 1, complement, shifted}, random).run();
      Suite<S, P>({31, 7, 6, 3, 8, complement, shifted}, random).run();
      Suite<S, P>({70, 33, 32, 64, 16, complement, shifted}, random).run();
      Suite<S, P>({300, 130, 18, 200, 1024, complement, shifted}, random).run();
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
