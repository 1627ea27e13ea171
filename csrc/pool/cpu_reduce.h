// What happens inside a window: the running maximum, the running maximum with its offset, the running sum; and loads of
// lanes one, two or any number of elements apart.
#pragma once

#include "common/simd/simd.h"

namespace fastconv {
namespace {

template <class Acc>
struct OffsetLanes;
template <>
struct OffsetLanes<float> {
  using Lane = int32_t;
  typedef uint8_t bytes __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 4)));
  typedef int32_t words __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
};
template <>
struct OffsetLanes<double> {
  using Lane = int64_t;
  typedef uint8_t bytes __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 8)));
  typedef int32_t words __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
};

/// A vector of offsets beside a vector of values: as wide as the accumulator, so that masks fit.
template <class Acc>
using Offsets = simd::Mask<Acc>;

template <class Acc>
FASTCONV_INLINE Offsets<Acc> broadcast_offset(int64_t offset) {
  return Offsets<Acc>{} + static_cast<typename OffsetLanes<Acc>::Lane>(offset);
}

// gcc 12 takes __builtin_convertvector between bytes and words apart lane by lane, hence the intrinsics.
template <class Acc>
FASTCONV_INLINE Offsets<Acc> load_offsets(const uint8_t* source) {
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (sizeof(Acc) == 4)
    return (Offsets<Acc>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  else return (Offsets<Acc>)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
#elif defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(Acc) == 4) {
    return (Offsets<Acc>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  } else {
    int32_t raw;
    std::memcpy(&raw, source, sizeof(raw));
    return (Offsets<Acc>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(raw));
  }
#else
  typename OffsetLanes<Acc>::bytes raw;
  std::memcpy(&raw, source, sizeof(raw));
  return __builtin_convertvector(raw, Offsets<Acc>);
#endif
}
template <class Acc>
FASTCONV_INLINE Offsets<Acc> load_offsets(const int32_t* source) {
  typename OffsetLanes<Acc>::words raw;
  std::memcpy(&raw, source, sizeof(raw));
  return __builtin_convertvector(raw, Offsets<Acc>);
}
template <class Acc>
FASTCONV_INLINE void store_offsets(uint8_t* target, Offsets<Acc> offsets) {
#if defined(FASTCONV_SIMD_AVX512)
  if constexpr (sizeof(Acc) == 4)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8((__m512i)offsets));
  else _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm512_cvtepi64_epi8((__m512i)offsets));
#elif defined(FASTCONV_SIMD_AVX2)
  // The low bytes to the front of each half, then the halves together.
  if constexpr (sizeof(Acc) == 4) {
    const __m256i front = _mm256_setr_epi32(0x0c080400, 0, 0, 0, 0x0c080400, 0, 0, 0);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)offsets, front);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(target),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  } else {
    const __m256i front = _mm256_setr_epi32(0x0800, 0, 0, 0, 0x0800, 0, 0, 0);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)offsets, front);
    const int32_t raw =
        _mm_cvtsi128_si32(_mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
    std::memcpy(target, &raw, sizeof(raw));
  }
#else
  const auto raw = __builtin_convertvector(offsets, typename OffsetLanes<Acc>::bytes);
  std::memcpy(target, &raw, sizeof(raw));
#endif
}
template <class Acc>
FASTCONV_INLINE void store_offsets(int32_t* target, Offsets<Acc> offsets) {
  const auto raw = __builtin_convertvector(offsets, typename OffsetLanes<Acc>::words);
  std::memcpy(target, &raw, sizeof(raw));
}

/// The first `count` lanes; the others are zero and their memory is not touched.
template <class Acc, class Offset>
FASTCONV_INLINE Offsets<Acc> load_first_offsets(const Offset* source, int64_t count) {
  Offset buffer[simd::kLanes<Acc>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load_offsets<Acc>(buffer);
}
template <class Acc, class Offset>
FASTCONV_INLINE void store_first_offsets(Offset* target, Offsets<Acc> offsets, int64_t count) {
  Offset buffer[simd::kLanes<Acc>];
  store_offsets<Acc>(buffer, offsets);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

// ---------------------------------------------------------------- lanes apart

// Elements 2 * i (even) or 2 * i + 1 (odd) of a and b laid end to end, in "pair order": on AVX2 one shuffle inside the
// halves, which unpair() puts right once per result instead of once per tap (gcc spends two permutations and a blend on
// the ordered form); elsewhere one permutation does it and pair order is plain order.
// even_overlapped: `b` was loaded one element early, so that nothing past the last even element is read.

#if defined(FASTCONV_SIMD_AVX2)
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> even_lanes(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  if constexpr (sizeof(Acc) == 4) return (simd::Vec<Acc>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  else return (simd::Vec<Acc>)_mm256_shuffle_pd((__m256d)a, (__m256d)b, 0x0);
}
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> odd_lanes(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  if constexpr (sizeof(Acc) == 4) return (simd::Vec<Acc>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  else return (simd::Vec<Acc>)_mm256_shuffle_pd((__m256d)a, (__m256d)b, 0xf);
}
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> even_lanes_overlapped(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  if constexpr (sizeof(Acc) == 4) return (simd::Vec<Acc>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xd8);
  else return (simd::Vec<Acc>)_mm256_shuffle_pd((__m256d)a, (__m256d)b, 0xa);
}
/// From pair order to plain order, and back: it is its own inverse.
template <class V>
FASTCONV_INLINE V unpair(V v) {
  return (V)_mm256_permute4x64_epi64((__m256i)v, 0xd8);
}
#else
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> even_lanes(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  constexpr int kLane = simd::kLanes<Acc>;
  if constexpr (kLane == 2) return __builtin_shufflevector(a, b, 0, 2);
  else if constexpr (kLane == 4) return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  else if constexpr (kLane == 8) return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  else return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> odd_lanes(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  constexpr int kLane = simd::kLanes<Acc>;
  if constexpr (kLane == 2) return __builtin_shufflevector(a, b, 1, 3);
  else if constexpr (kLane == 4) return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  else if constexpr (kLane == 8) return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  else return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> even_lanes_overlapped(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  constexpr int kLane = simd::kLanes<Acc>;
  if constexpr (kLane == 2) return __builtin_shufflevector(a, b, 0, 3);
  else if constexpr (kLane == 4) return __builtin_shufflevector(a, b, 0, 2, 5, 7);
  else if constexpr (kLane == 8) return __builtin_shufflevector(a, b, 0, 2, 4, 6, 9, 11, 13, 15);
  else return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
}
template <class V>
FASTCONV_INLINE V unpair(V v) {
  return v;
}
#endif
/// Lane i is lane i - 1 of v; lane 0 is zero.
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> shift_in_zero(simd::Vec<Acc> v) {
  constexpr int kLane = simd::kLanes<Acc>;
  const auto zero = simd::zero<Acc>();
  if constexpr (kLane == 2) return __builtin_shufflevector(zero, v, 1, 2);
  else if constexpr (kLane == 4) return __builtin_shufflevector(zero, v, 3, 4, 5, 6);
  else if constexpr (kLane == 8) return __builtin_shufflevector(zero, v, 7, 8, 9, 10, 11, 12, 13, 14);
  else return __builtin_shufflevector(zero, v, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
}
/// a0 b0 a1 b1 ...: the first kLanes of them, and the rest.
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> interleave_low(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  constexpr int kLane = simd::kLanes<Acc>;
  if constexpr (kLane == 2) return __builtin_shufflevector(a, b, 0, 2);
  else if constexpr (kLane == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  else if constexpr (kLane == 8) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> interleave_high(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  constexpr int kLane = simd::kLanes<Acc>;
  if constexpr (kLane == 2) return __builtin_shufflevector(a, b, 1, 3);
  else if constexpr (kLane == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  else if constexpr (kLane == 8) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// ---------------------------------------------------------------- reductions: start, take every tap in order, read;
// reorder() before reading if the taps came in pair order (above), in which start() then takes its offsets, too.

template <class Acc_>
struct RunningMax {
  using Acc = Acc_;
  static constexpr Acc kIdentity = -__builtin_inf();
  simd::Vec<Acc> value;

  FASTCONV_INLINE void start(Offsets<Acc>) { value = simd::broadcast<Acc>(kIdentity); }
  FASTCONV_INLINE void reorder() { value = unpair(value); }
  FASTCONV_INLINE void take(simd::Vec<Acc> x, int64_t) {
    // vmaxps returns its second operand where either is NaN: that keeps a NaN of `value`, and one blend adds those of
    // x.
#if defined(FASTCONV_SIMD_AVX2)
    if constexpr (sizeof(Acc) == 4) {
      const __m256 larger = _mm256_max_ps((__m256)x, (__m256)value);
      value = (simd::Vec<Acc>)_mm256_blendv_ps(larger, (__m256)x, _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q));
      return;
    }
#elif defined(FASTCONV_SIMD_AVX512)
    if constexpr (sizeof(Acc) == 4) {
      const __mmask16 unordered = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
      value = (simd::Vec<Acc>)_mm512_mask_mov_ps(_mm512_max_ps((__m512)x, (__m512)value), unordered, (__m512)x);
      return;
    }
#endif
    value = simd::max_propagate_nan<Acc>(x, value);
  }
};

/// torch's choice: the first of equal maxima, and a NaN always replaces what was there, so the last NaN wins.
template <class Acc_>
struct RunningMaxOffset {
  using Acc = Acc_;
  static constexpr Acc kIdentity = -__builtin_inf();
  simd::Vec<Acc> value;
  Offsets<Acc> offset;

  FASTCONV_INLINE void start(Offsets<Acc> first) {
    value = simd::broadcast<Acc>(kIdentity);
    offset = first;
  }
  FASTCONV_INLINE void reorder() {
    value = unpair(value);
    offset = unpair(offset);
  }
  FASTCONV_INLINE void take(simd::Vec<Acc> x, int64_t tap) {
#if defined(FASTCONV_SIMD_AVX2)
    if constexpr (sizeof(Acc) == 4) {
      const __m256 replaces = _mm256_or_ps(_mm256_cmp_ps((__m256)x, (__m256)value, _CMP_GT_OQ),
                                           _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q));
      value = (simd::Vec<Acc>)_mm256_blendv_ps((__m256)value, (__m256)x, replaces);
      offset = (Offsets<Acc>)_mm256_blendv_epi8((__m256i)offset, _mm256_set1_epi32(static_cast<int>(tap)),
                                                _mm256_castps_si256(replaces));
      return;
    }
#endif
    const Offsets<Acc> replaces = (x > value) | (x != x);
    value = replaces ? x : value;
    offset = replaces ? broadcast_offset<Acc>(tap) : offset;
  }
};

template <class Acc_>
struct RunningSum {
  using Acc = Acc_;
  static constexpr Acc kIdentity = 0;
  simd::Vec<Acc> value;

  FASTCONV_INLINE void start(Offsets<Acc>) { value = simd::zero<Acc>(); }
  FASTCONV_INLINE void reorder() { value = unpair(value); }
  FASTCONV_INLINE void take(simd::Vec<Acc> x, int64_t) { value += x; }
};

}  // namespace
}  // namespace fastconv
