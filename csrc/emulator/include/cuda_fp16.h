// The emulator's stand-in for CUDA's header of this name: what kernels may use of __half and __half2.
#pragma once

#include <bit>

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
inline bool __hisnan(__half value) { return (value.bits & 0x7fff) > 0x7c00; }

// Each operation rounds once, as the GPU's does: float has more than twice half's precision.
inline __half __hadd(__half a, __half b) { return __float2half_rn(float(a) + float(b)); }
inline __half __hsub(__half a, __half b) { return __float2half_rn(float(a) - float(b)); }
inline __half __hmul(__half a, __half b) { return __float2half_rn(float(a) * float(b)); }
inline __half __hfma(__half a, __half b, __half c) {
  return __float2half_rn(static_cast<float>(double(float(a)) * float(b) + float(c)));
}
inline __half __hneg(__half a) { return __ushort_as_half(a.bits ^ 0x8000); }
inline bool __hgt(__half a, __half b) { return float(a) > float(b); }
inline bool __hlt(__half a, __half b) { return float(a) < float(b); }
inline bool __heq(__half a, __half b) { return float(a) == float(b); }
/// The number where one operand is NaN; the _nan form gives NaN.
inline __half __hmax(__half a, __half b) { return __hisnan(a) || float(b) > float(a) ? b : a; }
inline __half __hmin(__half a, __half b) { return __hisnan(a) || float(b) < float(a) ? b : a; }
inline __half __hmax_nan(__half a, __half b) {
  return __hisnan(a) || __hisnan(b) ? __ushort_as_half(0x7fff) : __hmax(a, b);
}
inline __half __hmin_nan(__half a, __half b) {
  return __hisnan(a) || __hisnan(b) ? __ushort_as_half(0x7fff) : __hmin(a, b);
}
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
inline __half2 __hmin2_nan(__half2 a, __half2 b) { return {__hmin_nan(a.x, b.x), __hmin_nan(a.y, b.y)}; }

inline __half operator+(__half a, __half b) { return __hadd(a, b); }
inline __half operator-(__half a, __half b) { return __hsub(a, b); }
inline __half operator*(__half a, __half b) { return __hmul(a, b); }
inline __half operator-(__half a) { return __hneg(a); }

using half = __half;
using half2 = __half2;
