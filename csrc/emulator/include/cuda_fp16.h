// The emulator's stand-in for CUDA's header of this name: what kernels may use of __half and __half2.
#pragma once

#include <bit>

#include "emulator/half_arithmetic.h"
#include "emulator/language.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float value);
  __half(double value) : __half(static_cast<float>(value)) {}
  __half(int value) : __half(static_cast<float>(value)) {}
  operator float() const;
};
struct alignas(4) __half2 {
  __half x, y;
};

/// Exact: the exponent is rebased by a multiplication, which also turns subnormals into normal numbers.
inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const bool finite = (value.bits & 0x7c00) != 0x7c00;
  const uint32_t scaled =
      finite ? std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f) : magnitude | 0x7f800000;
  return std::bit_cast<float>(sign | scaled);
}
/// To nearest even; NaN becomes 0x7fff as on the GPU.
inline __half __float2half_rn(float value) {
  uint32_t magnitude = std::bit_cast<uint32_t>(value);
  const uint32_t sign = magnitude >> 16 & 0x8000;
  magnitude &= 0x7fffffff;
  __half half;
  if (magnitude > 0x7f800000) {
    half.bits = 0x7fff;
    return half;
  }
  uint32_t bits;
  if (magnitude >= 0x477ff000) {  // 65520, half way to the number after the largest
    bits = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the mantissa
    bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    bits = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  half.bits = static_cast<uint16_t>(sign | bits);
  return half;
}
inline __half::__half(float value) : bits(__float2half_rn(value).bits) {}
inline __half::operator float() const { return __half2float(*this); }

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half __ushort_as_half(unsigned short bits) {
  __half half;
  half.bits = bits;
  return half;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 __float2half2_rn(float value) { return __half2half2(__float2half_rn(value)); }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return __half2float(value.x); }
inline float __high2float(__half2 value) { return __half2float(value.y); }

using half = __half;
using half2 = __half2;
