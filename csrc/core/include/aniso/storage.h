// Storage formats of a row and their conversion to the format that sums are kept in: integer arithmetic only, so that
// loops over them vectorise for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "aniso/config.h"

namespace aniso {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
ANISO_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The format in which a storage format is computed.
template <typename S>
struct Working {
  using type = float;
};
template <>
struct Working<double> {
  using type = double;
};

template <typename T>
struct Convert {
  static ANISO_INLINE T load(T value) { return value; }
  static ANISO_INLINE T store(T value) { return value; }
};

template <>
struct Convert<BFloat16> {
  static ANISO_INLINE float load(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
  static ANISO_INLINE BFloat16 store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {uint16_t(is_nan ? 0x7fc0u : rounded)};
  }
};

template <>
struct Convert<Float16> {
  static ANISO_INLINE float load(Float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + 0x38000000u;  // exponent bias 15 to 127
    // Through an integer, so that they survive a thread that flushes subnormal floats to zero.
    const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(magnitude)) * bit_cast<float>(0x33800000u));
    const uint32_t special = (magnitude << 13) | 0x7f800000u;  // Inf and NaN keep their payload
    const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : finite));
  }
  static ANISO_INLINE Float16 store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Subnormal results: adding 0.5 aligns the mantissa so that the hardware rounds at the right place.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : (normal < 0x7c00u ? normal : 0x7c00u);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {uint16_t(sign | (magnitude >= 0x7f800000u ? special : finite))};
  }
};

template <typename S>
ANISO_INLINE typename Working<S>::type widen(S value) {
  return Convert<S>::load(value);
}
template <typename S>
ANISO_INLINE S narrow(typename Working<S>::type value) {
  return Convert<S>::store(value);
}

}  // namespace aniso
