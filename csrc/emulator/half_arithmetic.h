// What __half and __nv_bfloat16 have in common: arithmetic, comparisons, the larger and the smaller, pairs.
//
// Each operation rounds once, as the GPU's does: float has more than twice the precision of either.
#pragma once

#include <concepts>

struct __half;
struct __half2;
struct __nv_bfloat16;
struct __nv_bfloat162;

template <class T>
concept FastconvHalf = std::same_as<T, __half> || std::same_as<T, __nv_bfloat16>;
template <class T>
concept FastconvPair = std::same_as<T, __half2> || std::same_as<T, __nv_bfloat162>;

namespace fastconv::emulator {
template <FastconvHalf T>
T half_of_bits(uint16_t bits) {
  T result;
  result.bits = bits;
  return result;
}
template <FastconvHalf T>
T nan_of_half() {
  return half_of_bits<T>(0x7fff);
}
}  // namespace fastconv::emulator

// clang-format off: a line each where it fits
template <FastconvHalf T> T __hadd(T a, T b) { return T(float(a) + float(b)); }
template <FastconvHalf T> T __hsub(T a, T b) { return T(float(a) - float(b)); }
template <FastconvHalf T> T __hmul(T a, T b) { return T(float(a) * float(b)); }
template <FastconvHalf T> T __hfma(T a, T b, T c) { return T(double(float(a)) * float(b) + float(c)); }
template <FastconvHalf T> T __hneg(T a) { return fastconv::emulator::half_of_bits<T>(a.bits ^ 0x8000); }
template <FastconvHalf T> bool __hgt(T a, T b) { return float(a) > float(b); }
template <FastconvHalf T> bool __hlt(T a, T b) { return float(a) < float(b); }
template <FastconvHalf T> bool __heq(T a, T b) { return float(a) == float(b); }
template <FastconvHalf T> bool __hisnan(T a) { return float(a) != float(a); }
// The number where one operand is NaN; the _nan form gives NaN.
template <FastconvHalf T> T __hmax(T a, T b) { return __hisnan(a) || float(b) > float(a) ? b : a; }
template <FastconvHalf T> T __hmin(T a, T b) { return __hisnan(a) || float(b) < float(a) ? b : a; }
template <FastconvHalf T> T __hmax_nan(T a, T b) {
  return __hisnan(a) || __hisnan(b) ? fastconv::emulator::nan_of_half<T>() : __hmax(a, b);
}
template <FastconvHalf T> T __hmin_nan(T a, T b) {
  return __hisnan(a) || __hisnan(b) ? fastconv::emulator::nan_of_half<T>() : __hmin(a, b);
}
template <FastconvPair T> T __hadd2(T a, T b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
template <FastconvPair T> T __hsub2(T a, T b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
template <FastconvPair T> T __hmul2(T a, T b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
template <FastconvPair T> T __hfma2(T a, T b, T c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
template <FastconvPair T> T __hmax2(T a, T b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
template <FastconvPair T> T __hmin2(T a, T b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
template <FastconvPair T> T __hmax2_nan(T a, T b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
template <FastconvPair T> T __hmin2_nan(T a, T b) { return {__hmin_nan(a.x, b.x), __hmin_nan(a.y, b.y)}; }
template <FastconvHalf T> T operator+(T a, T b) { return __hadd(a, b); }
template <FastconvHalf T> T operator-(T a, T b) { return __hsub(a, b); }
template <FastconvHalf T> T operator*(T a, T b) { return __hmul(a, b); }
template <FastconvHalf T> T operator-(T a) { return __hneg(a); }
// clang-format on
