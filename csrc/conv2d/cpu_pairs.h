// Pairs of bfloat16 as elements of the register tile: one AVX512-BF16 dot product adds two products to every sum, so a
// step of depth is two numbers of a row and two of a column.
//
// The instruction adds the second product first, rounds to nearest even after each, takes denormal numbers for zeros
// and flushes denormal results; infinities and NaNs act as in a fused multiply-add.
#pragma once

#include "conv2d/cpu_tile.h"
#include "conv2d/cpu_transpose.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Two neighbouring numbers, wherever they lie.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

inline constexpr int64_t kNumbers = 32;  // of a vector

/// How the sums of a tile become outputs, without leaving the registers before.
template <>
struct TileFinish<Pair> {
  BFloat16* y;               // column 0
  const BFloat16* residual;  // likewise, or null
  const int64_t* row_offsets;
  const float* scale;  // of column 0, or of row 0; or null
  const float* shift;
  bool channels_are_rows;
  Activation activation;
  __mmask32 columns;
};
using PairFinish = TileFinish<Pair>;

/// value = value * scale for every sum, or value + shift.
template <bool kScales, int kRows, int kVectors>
FASTCONV_INLINE void finish_channels(const PairFinish& f, const float* numbers,
                                     simd::Vec<float> (&sums)[kRows][kVectors]) {
  using V = simd::Vec<float>;
  V columns[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const auto mask = static_cast<__mmask16>(f.columns >> 16 * v);
    columns[v] = f.channels_are_rows ? V{} : (V)_mm512_maskz_loadu_ps(mask, numbers + 16 * v);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V value = f.channels_are_rows ? simd::broadcast(numbers[row]) : columns[v];
      sums[row][v] = kScales ? sums[row][v] * value : sums[row][v] + value;
    }
}

template <int kRows, int kVectors>
FASTCONV_INLINE void finish_pairs(const PairFinish& f, simd::Vec<float> (&sums)[kRows][kVectors]) {
  using V = simd::Vec<float>;
  if (f.scale) finish_channels<true>(f, f.scale, sums);
  if (f.shift) finish_channels<false>(f, f.shift, sums);
  if (f.residual) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto mask = static_cast<__mmask16>(f.columns >> 16 * v);
        const __m256i numbers = _mm256_maskz_loadu_epi16(mask, f.residual + f.row_offsets[row] + 16 * v);
        sums[row][v] += (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
      }
  }
  if (f.activation != Activation::none) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = simd::activate<float>(sums[row][v], Activation::relu);
  }
  if (f.activation == Activation::relu6) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = simd::activate<float>(sums[row][v], Activation::relu6);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    BFloat16* y = f.y + f.row_offsets[row];
    if constexpr (kVectors == 1) {
      _mm256_mask_storeu_epi16(y, static_cast<__mmask16>(f.columns), (__m256i)_mm512_cvtneps_pbh((__m512)sums[row][0]));
    } else {
      const auto numbers = (__m512i)_mm512_cvtne2ps_pbh((__m512)sums[row][1], (__m512)sums[row][0]);
      if (f.columns == ~__mmask32{0}) _mm512_storeu_si512(y, numbers);
      else _mm512_mask_storeu_epi16(y, f.columns, numbers);
    }
  }
}

template <>
struct TileStep<Pair> {
  using Vector = simd::Vec<float>;
  static constexpr bool kStoresFinished = true;
  static FASTCONV_INLINE Vector broadcast(Pair pair) { return (Vector)_mm512_set1_epi32(static_cast<int>(pair.bits)); }
  static FASTCONV_INLINE Vector add_product(Vector a, Vector b, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  template <int kRows, int kVectors>
  static FASTCONV_INLINE void prefetch(const TileCall<Pair>&) {}
  template <int kRows, int kVectors>
  static FASTCONV_INLINE void finish(const TileCall<Pair>& call, Vector (&sums)[kRows][kVectors]) {
    finish_pairs(call.finish, sums);
  }
};

/// The tile of a call, which finishes or leaves sums.
template <Rows kOrder>
TileFunction<Pair> pair_tile(bool finishes, int64_t rows, int64_t columns) {
  return finishes ? kFinishingTiles<Pair, kOrder>.at(rows, columns) : kTiles<Pair, kOrder>.at(rows, columns);
}

inline constexpr int64_t kPairColumns = kTileColumns<Pair>;
inline constexpr int64_t kNumberBytes = sizeof(BFloat16), kPairBytes = sizeof(Pair), kSumBytes = sizeof(float);

/// Only tanh, a call for every number, is left to the stores of float32 sums.
FASTCONV_INLINE bool finishes_in_registers(const GemmConv& p) { return p.epilogue.activation != Activation::tanh; }

FASTCONV_INLINE PairFinish pair_finish(const GemmConv& p, int64_t channel, int64_t y_offset, bool channels_are_rows,
                                       __mmask32 columns, const int64_t* row_offsets) {
  const Epilogue& e = p.epilogue;
  const auto at = [&](const void* numbers) { return numbers ? static_cast<const float*>(numbers) + channel : nullptr; };
  const auto* residual = static_cast<const BFloat16*>(e.residual);
  return {static_cast<BFloat16*>(p.y) + y_offset,
          residual ? residual + y_offset : nullptr,
          row_offsets,
          at(e.scale),
          at(e.shift),
          channels_are_rows,
          e.activation,
          columns};
}

/// Bits [begin, end) of a mask, clipped to a vector.
FASTCONV_INLINE __mmask32 lanes_between(int64_t begin, int64_t end) {
  const int64_t low = max_of(begin, 0), high = min_of(end, kNumbers);
  if (low >= high) return 0;
  return static_cast<__mmask32>((uint64_t{1} << high) - (uint64_t{1} << low));
}

/// Numbers of the mask, zeros elsewhere; no other memory is touched.
FASTCONV_INLINE __m512i load_numbers(const BFloat16* source, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, source);
}

/// target[i] = {first[i], second[i]} for the 32 numbers of two vectors; they may have lain there.
FASTCONV_INLINE void store_pairs(Pair* target, __m512i first, __m512i second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(first));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(first, 1));
  const __m512i second_low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(second));
  const __m512i second_high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(second, 1));
  _mm512_storeu_si512(target, _mm512_or_si512(low, _mm512_slli_epi32(second_low, 16)));
  _mm512_storeu_si512(target + kNumbers / 2, _mm512_or_si512(high, _mm512_slli_epi32(second_high, 16)));
}

/// target[i * target_stride + row] = pair i of a row: up to 16 rows of `count` <= 32 numbers, zeros beyond. Writes
/// whole vectors of ceil(count / 2) targets in rising order: a stride below 16 is overwritten by the next.
inline void transpose_pairs(const BFloat16* source, int64_t source_stride, int64_t rows, int64_t count, Pair* target,
                            int64_t target_stride) {
  const __mmask32 mask = lanes_between(0, count);
  __m512 columns[16];
#pragma GCC unroll 16
  for (int64_t r = 0; r < 16; ++r)
    columns[r] = _mm512_castsi512_ps(load_numbers(source + min_of(r, rows - 1) * source_stride, r < rows ? mask : 0));
  transpose_registers(columns);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i)
    if (2 * i < count) _mm512_storeu_si512(target + i * target_stride, _mm512_castps_si512(columns[i]));
}

}  // namespace
}  // namespace fastconv
