// Vector loads that fill some of the lanes: the pieces from which packing puts a vector together.
#pragma once

#include "common/simd/simd.h"

namespace fastconv {
namespace {

/// Lanes [begin, end) of a vector, with the masks that loading them needs.
template <class Acc>
struct LaneRange {
  int64_t begin, end;
#if defined(FASTCONV_SIMD_AVX2)
  simd::Mask<Acc> mask;       // of the lanes
  simd::Mask<Acc> even_low;   // of source elements 0 .. kLanes-1 when every second element is taken
  simd::Mask<Acc> even_high;  // of source elements kLanes .. 2 * kLanes - 1
#endif

  LaneRange(int64_t first, int64_t last) : begin(first), end(last) {
#if defined(FASTCONV_SIMD_AVX2)
    constexpr int kLane = simd::kLanes<Acc>;
    simd::Mask<Acc> lane{};
    for (int i = 0; i < kLane; ++i) lane[i] = i;
    const simd::Mask<Acc> even = (lane & 1) == 0;
    mask = between(lane, begin, end);
    even_low = even & between(lane, 2 * begin, 2 * end);
    even_high = even & between(lane, 2 * begin - kLane, 2 * end - kLane);
#endif
  }

 private:
  static FASTCONV_INLINE simd::Mask<Acc> between(simd::Mask<Acc> lane, int64_t low, int64_t high) {
    using Lane = decltype(lane[0] + 0);
    return (lane >= static_cast<Lane>(low)) & (lane < static_cast<Lane>(high));
  }
};

#if defined(FASTCONV_SIMD_AVX2)
FASTCONV_INLINE simd::Vec<float> load_masked(const float* source, simd::Mask<float> mask) {
  return (simd::Vec<float>)_mm256_maskload_ps(source, (__m256i)mask);
}
FASTCONV_INLINE simd::Vec<double> load_masked(const double* source, simd::Mask<double> mask) {
  return (simd::Vec<double>)_mm256_maskload_pd(source, (__m256i)mask);
}
/// Elements 0, 2, 4, ... of (low, high).
FASTCONV_INLINE simd::Vec<float> even_elements(simd::Vec<float> low, simd::Vec<float> high) {
  const __m256 pairs = _mm256_shuffle_ps((__m256)low, (__m256)high, 0x88);  // l0 l2 h0 h2 | l4 l6 h4 h6
  return (simd::Vec<float>)_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8);
}
FASTCONV_INLINE simd::Vec<double> even_elements(simd::Vec<double> low, simd::Vec<double> high) {
  const __m256d pairs = _mm256_unpacklo_pd((__m256d)low, (__m256d)high);  // l0 h0 | l2 h2
  return (simd::Vec<double>)_mm256_permute4x64_pd(pairs, 0xd8);
}
#endif

/// Lane l holds source[l * step] for l in the range, zero elsewhere; no other memory is touched.
template <class T>
FASTCONV_INLINE simd::Vec<acc_t<T>> load_range(const T* source, int64_t step, const LaneRange<acc_t<T>>& range) {
  using Acc = acc_t<T>;
#if defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(T) == sizeof(Acc)) {
    if (step == 1) return load_masked(source, range.mask);
    if (step == 2)
      return even_elements(load_masked(source, range.even_low),
                           load_masked(source + simd::kLanes<Acc>, range.even_high));
  }
#elif defined(FASTCONV_SIMD_AVX512)
  if constexpr (sizeof(T) == sizeof(Acc)) {
    const uint64_t lanes = (uint64_t{1} << range.end) - (uint64_t{1} << range.begin);
    if constexpr (sizeof(T) == 4)
      if (step == 1) return (simd::Vec<Acc>)_mm512_maskz_loadu_ps((__mmask16)lanes, source);
    if constexpr (sizeof(T) == 8)
      if (step == 1) return (simd::Vec<Acc>)_mm512_maskz_loadu_pd((__mmask8)lanes, source);
  } else if (step == 1 && range.begin == 0) {
    return simd::load_first(source, range.end);
  }
#endif
  auto result = simd::zero<Acc>();
  for (int64_t lane = range.begin; lane < range.end; ++lane) result[lane] = simd::widen(source[lane * step]);
  return result;
}

/// The union of two vectors whose filled lanes are disjoint.
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> merge(simd::Vec<Acc> a, simd::Vec<Acc> b) {
  return (simd::Vec<Acc>)((simd::Mask<Acc>)a | (simd::Mask<Acc>)b);
}

/// The first `count` lanes, `step` apart. Not with AVX2's masked stores: they take a dozen cycles each on AMD's cores.
template <class T>
FASTCONV_INLINE void store_head(T* target, int64_t step, simd::Vec<acc_t<T>> value, int64_t count) {
#if defined(FASTCONV_SIMD_AVX512)
  if (step == 1) return simd::store_first<T>(target, value, count);
#endif
  acc_t<T> lanes[simd::kLanes<acc_t<T>>];
  simd::store<acc_t<T>>(lanes, value);
  for (int64_t i = 0; i < count; ++i) target[i * step] = simd::narrow<T>(lanes[i]);
}

}  // namespace
}  // namespace fastconv
