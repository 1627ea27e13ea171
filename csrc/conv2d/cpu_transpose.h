// Transposition of small blocks: pixels that lie side by side in memory become rows of a panel, and back.
#pragma once

#include "common/simd/simd.h"

namespace fastconv {
namespace {

#if defined(FASTCONV_SIMD_AVX512)
/// A square of 16 x 16 elements of 32 bits, in place.
FASTCONV_INLINE void transpose_registers(__m512 (&rows)[16]) {
  __m512 pairs[16];
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    pairs[r] = _mm512_unpacklo_ps(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm512_unpackhi_ps(rows[r], rows[r + 1]);
  }
  // Quarter q of fours[4 * r + c]: column 4 * q + c of rows 4 * r to 4 * r + 3.
  __m512d fours[16];
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    fours[r] = _mm512_unpacklo_pd(_mm512_castps_pd(pairs[r]), _mm512_castps_pd(pairs[r + 2]));
    fours[r + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(pairs[r]), _mm512_castps_pd(pairs[r + 2]));
    fours[r + 2] = _mm512_unpacklo_pd(_mm512_castps_pd(pairs[r + 1]), _mm512_castps_pd(pairs[r + 3]));
    fours[r + 3] = _mm512_unpackhi_pd(_mm512_castps_pd(pairs[r + 1]), _mm512_castps_pd(pairs[r + 3]));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512d even_low = _mm512_shuffle_f64x2(fours[c], fours[4 + c], 0x88);
    const __m512d odd_low = _mm512_shuffle_f64x2(fours[c], fours[4 + c], 0xdd);
    const __m512d even_high = _mm512_shuffle_f64x2(fours[8 + c], fours[12 + c], 0x88);
    const __m512d odd_high = _mm512_shuffle_f64x2(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(even_low, even_high, 0x88));
    rows[4 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd_low, odd_high, 0x88));
    rows[8 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(even_low, even_high, 0xdd));
    rows[12 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd_low, odd_high, 0xdd));
  }
}
#endif

/// target[i * target_stride + lane] = source[lane * source_stride + i] for a square of kLanes x kLanes.
template <class Acc>
FASTCONV_INLINE void transpose_square(const Acc* source, int64_t source_stride, Acc* target, int64_t target_stride) {
  constexpr int kLane = simd::kLanes<Acc>;
#if defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(Acc) == 4) {
    __m256 halves[8], pairs[8];
    // Rows r and r + 4 share a register, one half each, so that no shuffle below has to cross halves.
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const float* row = source + r % 4 * source_stride + r / 4 * 4;
      halves[r] =
          _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * source_stride), 1);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 8; h += 4) {
      pairs[h] = _mm256_unpacklo_ps(halves[h], halves[h + 1]);
      pairs[h + 1] = _mm256_unpackhi_ps(halves[h], halves[h + 1]);
      pairs[h + 2] = _mm256_unpacklo_ps(halves[h + 2], halves[h + 3]);
      pairs[h + 3] = _mm256_unpackhi_ps(halves[h + 2], halves[h + 3]);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 8; h += 4) {
      _mm256_storeu_ps(target + h * target_stride, _mm256_shuffle_ps(pairs[h], pairs[h + 2], 0x44));
      _mm256_storeu_ps(target + (h + 1) * target_stride, _mm256_shuffle_ps(pairs[h], pairs[h + 2], 0xee));
      _mm256_storeu_ps(target + (h + 2) * target_stride, _mm256_shuffle_ps(pairs[h + 1], pairs[h + 3], 0x44));
      _mm256_storeu_ps(target + (h + 3) * target_stride, _mm256_shuffle_ps(pairs[h + 1], pairs[h + 3], 0xee));
    }
    return;
  }
#elif defined(FASTCONV_SIMD_AVX512)
  if constexpr (sizeof(Acc) == 4) {
    __m512 rows[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) rows[r] = _mm512_loadu_ps(source + r * source_stride);
    transpose_registers(rows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(target + i * target_stride, rows[i]);
    return;
  }
#endif
  for (int i = 0; i < kLane; ++i)
    for (int lane = 0; lane < kLane; ++lane) target[i * target_stride + lane] = source[lane * source_stride + i];
}

/// target[i * target_stride + lane] = source[lane * source_stride + i] for lane < lanes, i < length.
template <class T>
void transpose_rows(const T* source, int64_t source_stride, int64_t lanes, int64_t length, acc_t<T>* target,
                    int64_t target_stride) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  for (int64_t lane = 0; lane < lanes; lane += kLane) {
    const int64_t live = min_of(kLane, lanes - lane);
    int64_t i = 0;
    if constexpr (sizeof(T) == sizeof(Acc)) {
      if (live == kLane)
        for (; i + kLane <= length; i += kLane)
          transpose_square<Acc>(source + lane * source_stride + i, source_stride, target + i * target_stride + lane,
                                target_stride);
    }
    for (; i < length; ++i)
      for (int64_t l = lane; l < lane + live; ++l)
        target[i * target_stride + l] = simd::widen(source[l * source_stride + i]);
  }
}

/// target[i * target_stride + lane] = source[lane * source_stride + i] for `lanes` lanes and `length` i's, kLanes at
/// most, zero in the other lanes. Writes kLanes i's, and reads as many if `readable`.
template <class T>
FASTCONV_INLINE void transpose_part(const T* source, int64_t source_stride, int64_t lanes, int64_t length,
                                    bool readable, acc_t<T>* target, int64_t target_stride) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  if constexpr (sizeof(T) == sizeof(Acc))
    if (lanes == kLane && readable) return transpose_square<Acc>(source, source_stride, target, target_stride);
  alignas(64) Acc square[kLane * kLane];
  for (int64_t lane = 0; lane < kLane; ++lane) {
    const T* row = source + lane * source_stride;
    const auto value = lane >= lanes ? simd::zero<Acc>() : readable ? simd::load(row) : simd::load_first(row, length);
    simd::store<Acc>(square + lane * kLane, value);
  }
  transpose_square<Acc>(square, kLane, target, target_stride);
}

}  // namespace
}  // namespace fastconv
