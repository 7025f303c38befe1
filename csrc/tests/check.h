// What every test shares: a check that counts, repeatable random numbers, and output buffers that notice stray writes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace aniso_test {

// Each test file defines this one; test_main.cpp calls it.
void run_tests();

struct Counts {
  int64_t checks = 0;
  int64_t failures = 0;
};
Counts& counts();
constexpr int64_t kPrintedFailures = 25;

template <typename... Values>
void check(bool passed, const char* file, int line, const char* format, Values... values) {
  ++counts().checks;
  if (passed || ++counts().failures > kPrintedFailures) return;
  std::fprintf(stderr, "%s:%d: ", file, line);
  std::fprintf(stderr, format, values...);
  std::fputc('\n', stderr);
}

#define ANISO_FILE (__builtin_strrchr(__FILE__, '/') ? __builtin_strrchr(__FILE__, '/') + 1 : __FILE__)
#define CHECK(passed, ...) ::aniso_test::check((passed), ANISO_FILE, __LINE__, __VA_ARGS__)

// splitmix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * (double(bits() >> 11) * 0x1p-53); }

 private:
  uint64_t state_;
};

// `size` elements, all NaN at first in every format, between two bands that must not change. The elements start one
// element past an aligned address, so that no kernel can rely on more alignment than their own.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t size) : size_(size), bytes_(size_t(2 * kBand + (size + 1) * int64_t(sizeof(T))), kBandByte) {
    std::memset(data(), 0xff, size_t(size) * sizeof(T));
  }

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kBand) + 1; }
  const T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return size_; }

  bool intact() const {
    const unsigned char* end = bytes_.data() + bytes_.size();
    for (const unsigned char* at = bytes_.data(); at < bytes_.data() + kBand + sizeof(T); ++at) {
      if (*at != kBandByte) return false;
    }
    for (const unsigned char* at = end - kBand; at < end; ++at) {
      if (*at != kBandByte) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kBand = 256;
  static constexpr unsigned char kBandByte = 0xa5;
  int64_t size_;
  std::vector<unsigned char> bytes_;
};

}  // namespace aniso_test
