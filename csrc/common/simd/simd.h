// The vector layer: about fifteen operations over the compiler's vector extensions, with intrinsics only where the
// extensions have no word for it (fused multiply-add, masked access, 16-bit conversion). Include after one target_*.h.
//
// Arithmetic (+ - * /), comparisons and `mask ? a : b` are the extensions' own operators.
// Everything lives in an unnamed namespace: each instruction set keeps its own copy.
#pragma once

#include "common/problem.h"

namespace fastconv {
namespace {
namespace simd {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(FASTCONV_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(FASTCONV_VECTOR_BYTES), aligned(8), may_alias));
};

/// A vector of accumulator type T (float or double), and its lane count.
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Mask = typename VecOf<T>::mask;
template <class T>
inline constexpr int kLanes = FASTCONV_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
FASTCONV_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}
template <class T>
FASTCONV_INLINE Vec<T> zero() {
  return Vec<T>{};
}

// ---------------------------------------------------------------- scalar conversions of the storage types

FASTCONV_INLINE float widen(float value) { return value; }
FASTCONV_INLINE double widen(double value) { return value; }
FASTCONV_INLINE float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
FASTCONV_INLINE float widen(Half value) {
  // Shift the exponent and mantissa into float32's place, then rescale by 2^112: exact, subnormals included.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  float result;
  if (magnitude >= (0x7c00u << 13)) {  // infinity or NaN
    magnitude |= 0x7f800000u;
    std::memcpy(&result, &magnitude, sizeof(result));
  } else {
    std::memcpy(&result, &magnitude, sizeof(result));
    result *= 0x1p112f;
  }
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof(bits));
  bits |= sign;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class T>
FASTCONV_INLINE T narrow(acc_t<T> value);
template <>
FASTCONV_INLINE float narrow<float>(float value) {
  return value;
}
template <>
FASTCONV_INLINE double narrow<double>(double value) {
  return value;
}
/// Round to nearest, ties to even; NaN stays a quiet NaN.
template <>
FASTCONV_INLINE BFloat16 narrow<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
FASTCONV_INLINE Half narrow<Half>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more: infinity
  uint32_t half;
  if (bits < 0x38800000u) {
    // Subnormal result: adding 0.5 lines the mantissa up so that the FPU's own rounding is half's rounding.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// ---------------------------------------------------------------- fused multiply-add, min, max

template <class T>
FASTCONV_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(FASTCONV_SIMD_NEON)
  if constexpr (sizeof(T) == 4) return (Vec<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

/// max that keeps a NaN of either side, as torch's pooling and clamping do.
template <class T>
FASTCONV_INLINE Vec<T> max_propagate_nan(Vec<T> a, Vec<T> b) {
  return (a > b) | (a != a) ? a : b;
}
template <class T>
FASTCONV_INLINE Vec<T> min_propagate_nan(Vec<T> a, Vec<T> b) {
  return (a < b) | (a != a) ? a : b;
}

/// max and min with a bound that is no NaN; x may be one and stays it. x86 has just that: of a pair with a NaN its
/// instructions give the second.
template <class T>
FASTCONV_INLINE Vec<T> at_least(Vec<T> x, Vec<T> bound) {
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (__is_same(T, float)) return (Vec<T>)_mm512_max_ps((__m512)bound, (__m512)x);
  if constexpr (__is_same(T, double)) return (Vec<T>)_mm512_max_pd((__m512d)bound, (__m512d)x);
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (__is_same(T, float)) return (Vec<T>)_mm256_max_ps((__m256)bound, (__m256)x);
  if constexpr (__is_same(T, double)) return (Vec<T>)_mm256_max_pd((__m256d)bound, (__m256d)x);
#endif
  return bound > x ? bound : x;
}
template <class T>
FASTCONV_INLINE Vec<T> at_most(Vec<T> x, Vec<T> bound) {
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (__is_same(T, float)) return (Vec<T>)_mm512_min_ps((__m512)bound, (__m512)x);
  if constexpr (__is_same(T, double)) return (Vec<T>)_mm512_min_pd((__m512d)bound, (__m512d)x);
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (__is_same(T, float)) return (Vec<T>)_mm256_min_ps((__m256)bound, (__m256)x);
  if constexpr (__is_same(T, double)) return (Vec<T>)_mm256_min_pd((__m256d)bound, (__m256d)x);
#endif
  return bound < x ? bound : x;
}

/// result[lane] = value[lanes[lane]], for lanes in range.
template <class T>
FASTCONV_INLINE Vec<T> permute(Vec<T> value, Mask<T> lanes) {
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_permutexvar_ps((__m512i)lanes, (__m512)value);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_permutexvar_pd((__m512i)lanes, (__m512d)value);
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_permutevar8x32_ps((__m256)value, (__m256i)lanes);
#endif
  Vec<T> result;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) result[lane] = value[lanes[lane]];
  return result;
}

// ---------------------------------------------------------------- loads and stores, widening to the accumulator type

/// One vector of acc_t<T> from kLanes consecutive elements of storage type T; no alignment asked.
template <class T>
FASTCONV_INLINE Vec<acc_t<T>> load(const T* source) {
  using Acc = acc_t<T>;
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return *reinterpret_cast<const typename VecOf<Acc>::unaligned*>(source);
  } else {
#if defined(FASTCONV_SIMD_AVX512)
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    if constexpr (__is_same(T, Half)) return (Vec<Acc>)_mm512_cvtph_ps(raw);
    else return (Vec<Acc>)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif defined(FASTCONV_SIMD_AVX2)
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    if constexpr (__is_same(T, Half)) return (Vec<Acc>)_mm256_cvtph_ps(raw);
    else return (Vec<Acc>)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
    Vec<Acc> result;
    for (int i = 0; i < kLanes<Acc>; ++i) result[i] = widen(source[i]);
    return result;
#endif
  }
}

#if defined(FASTCONV_SIMD_AVX512)
/// As narrow<BFloat16>; with AVX512-BF16 numbers below float32's normal range become zeros, as in its dot products.
FASTCONV_INLINE __m256i narrow_to_bfloat16(Vec<float> value) {
#if defined(FASTCONV_SIMD_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh((__m512)value);
#else
  const __m512i bits = (__m512i)value, top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, quiet));
#endif
}
#endif

template <class T>
FASTCONV_INLINE void store(T* target, Vec<acc_t<T>> value) {
  using Acc = acc_t<T>;
  if constexpr (sizeof(T) == sizeof(Acc)) {
    *reinterpret_cast<typename VecOf<Acc>::unaligned*>(target) = value;
  } else {
#if defined(FASTCONV_SIMD_AVX512) || defined(FASTCONV_SIMD_AVX2)
    if constexpr (__is_same(T, Half)) {
#if defined(FASTCONV_SIMD_AVX512)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                          _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#endif
      return;
    }
#endif
#if defined(FASTCONV_SIMD_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), narrow_to_bfloat16(value));
#else
    for (int i = 0; i < kLanes<Acc>; ++i) target[i] = narrow<T>(value[i]);
#endif
  }
}

/// The first `count` lanes, 0 <= count <= kLanes; the other lanes are zero and their memory is not touched.
template <class T>
FASTCONV_INLINE Vec<acc_t<T>> load_first(const T* source, int64_t count) {
  using Acc = acc_t<T>;
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (__is_same(T, float)) return (Vec<Acc>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), source);
  if constexpr (__is_same(T, double)) return (Vec<Acc>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), source);
  if constexpr (sizeof(T) == 2) {
    const __m256i raw = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), source);
    if constexpr (__is_same(T, Half)) return (Vec<Acc>)_mm512_cvtph_ps(raw);
    else return (Vec<Acc>)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (__is_same(T, float)) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return (Vec<Acc>)_mm256_maskload_ps(source, mask);
  }
  if constexpr (__is_same(T, double)) {
    const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
    return (Vec<Acc>)_mm256_maskload_pd(source, mask);
  }
#endif
  T buffer[kLanes<Acc>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load(buffer);
}

template <class T>
FASTCONV_INLINE void store_first(T* target, Vec<acc_t<T>> value, int64_t count) {
  using Acc = acc_t<T>;
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (__is_same(T, float))
    return _mm512_mask_storeu_ps(target, (__mmask16)((1u << count) - 1), (__m512)value);
  if constexpr (__is_same(T, double))
    return _mm512_mask_storeu_pd(target, (__mmask8)((1u << count) - 1), (__m512d)value);
  if constexpr (__is_same(T, Half))
    return _mm256_mask_storeu_epi16(target, (__mmask16)((1u << count) - 1),
                                    _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
  if constexpr (__is_same(T, BFloat16))
    return _mm256_mask_storeu_epi16(target, (__mmask16)((1u << count) - 1), narrow_to_bfloat16(value));
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (__is_same(T, float)) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return _mm256_maskstore_ps(target, mask, (__m256)value);
  }
  if constexpr (__is_same(T, double)) {
    const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_maskstore_pd(target, mask, (__m256d)value);
  }
#endif
  T buffer[kLanes<Acc>];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

/// kLanes elements, `stride` elements apart.
template <class T>
FASTCONV_INLINE Vec<acc_t<T>> load_strided(const T* source, int64_t stride) {
  using Acc = acc_t<T>;
  Vec<Acc> result;
  for (int i = 0; i < kLanes<Acc>; ++i) result[i] = widen(source[i * stride]);
  return result;
}

/// Sum of the lanes, by halves: a few instructions, and of less rounding, where lane after lane takes one for each.
template <class T>
FASTCONV_INLINE T sum(Vec<T> value) {
  typedef T Part __attribute__((vector_size(16)));
  constexpr int kParts = FASTCONV_VECTOR_BYTES / 16;
  Part parts[kParts];
  std::memcpy(parts, &value, sizeof(parts));
  for (int width = kParts / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  if constexpr (sizeof(T) == 8) return parts[0][0] + parts[0][1];
  else return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/// What follows a convolution's sum: y = activation(x). A NaN stays a NaN, as in torch.
template <class T>
FASTCONV_INLINE Vec<T> activate(Vec<T> x, Activation activation) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      return at_least<T>(x, zero<T>());
    case Activation::relu6:
      return at_most<T>(at_least<T>(x, zero<T>()), broadcast<T>(T(6)));
    case Activation::tanh:
      for (int i = 0; i < kLanes<T>; ++i) x[i] = std::tanh(x[i]);
      return x;
  }
  return x;
}

}  // namespace simd
}  // namespace
}  // namespace fastconv
