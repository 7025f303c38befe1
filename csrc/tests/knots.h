// Radius maps for tests, with the coarse index built from its definition (knot_buckets in aniso_ext/ops/operands.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "aniso/block_math.h"
#include "check.h"

namespace aniso_test {

enum class KnotShape { even, crowded, coinciding };

template <typename T>
struct RadiusMaps {
  std::vector<aniso::Segment<T>> segments;  // [blocks, knots + 1]
  std::vector<int16_t> buckets;             // [blocks, bucket_count]
  std::vector<int32_t> windows;             // [blocks]
  int32_t bucket_count;

  // What a kernel does with a radius of the first and only block.
  aniso::Mapped<T> operator()(T radius) const {
    const T scale = T(bucket_count) / segments.back().start;
    const int32_t base = buckets[size_t(aniso::bucket_of(radius, scale, bucket_count))];
    return aniso::map_radius(segments.data(), base, windows[0], radius);
  }

  RadiusMaps(int32_t blocks, int32_t knots, int32_t bucket_count, KnotShape shape, Random& random)
      : bucket_count(bucket_count) {
    for (int32_t block = 0; block < blocks; ++block) {
      append(sorted_knots(knots, shape, random), sorted_knots(knots, KnotShape::even, random));
    }
    index(blocks, knots);
  }

 private:
  static std::vector<double> sorted_knots(int32_t knots, KnotShape shape, Random& random) {
    std::vector<double> values;
    for (int32_t i = 0; i < knots; ++i) {
      double value = 0.05 + (i + random.uniform(0.0, 0.8)) / knots;
      if (shape == KnotShape::crowded && i + 1 < knots) value = 0.3 + 1e-4 * value;  // the last stays far away
      if (shape == KnotShape::coinciding) value = 0.05 + std::floor(4 * value) / 4;
      values.push_back(value);
    }
    std::sort(values.begin(), values.end());
    return values;
  }

  void append(const std::vector<double>& source, const std::vector<double>& target) {
    const size_t last = source.size() - 1;
    segments.push_back({T(0), T(0), T(target[0] / source[0])});
    for (size_t i = 0; i < last; ++i) {
      const double width = source[i + 1] - source[i];
      segments.push_back({T(source[i]), T(target[i]), width > 0 ? T((target[i + 1] - target[i]) / width) : T(0)});
    }
    segments.push_back({T(source[last]), T(target[last]), T(target[last] / source[last])});
  }

  void index(int32_t blocks, int32_t knots) {
    for (int32_t block = 0; block < blocks; ++block) {
      const aniso::Segment<T>* map = segments.data() + size_t(block) * size_t(knots + 1);
      const T scale = T(bucket_count) / map[knots].start;
      std::vector<int32_t> below(static_cast<size_t>(bucket_count));
      int32_t window = 1;
      for (int32_t bucket = 0; bucket < bucket_count; ++bucket) {
        int32_t inside = 0;
        for (int32_t i = 1; i <= knots; ++i) {
          const T position = map[i].start * scale;
          const int32_t of_knot = std::min(int32_t(position), bucket_count - 1);
          below[size_t(bucket)] += of_knot < bucket;
          inside += of_knot == bucket;
        }
        window = std::max(window, inside);
      }
      for (const int32_t count : below) buckets.push_back(int16_t(std::min(count, knots - window)));
      windows.push_back(window);
    }
  }
};

}  // namespace aniso_test
