// The transforms of Winograd's F(4x4, 3x3): Y = A^T [(G g G^T) o (B^T d B)] A, for a 3x3 filter g, a 6x6 piece d of the
// input and the 4x4 outputs Y.
//
// The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity (Barabasz et al., "Error analysis and improving the accuracy of
// Winograd convolution for deep neural networks", 2020, on why points whose products are near 1 are good ones). With
// a = sqrt(1/2) and b = sqrt(2), a * b = 1, and row p of B^T holds the coefficients of the product of (x - q) over the
// other finite points q, row p of G is [1 p p^2] over that product at p, column p of A^T is [1 p p^2 p^3].
#pragma once

#include "common/simd/simd.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

inline constexpr int64_t kWinogradInputs = 6, kWinogradProducts = 36;

inline constexpr double kPointA = 0.70710678118654752440, kPointB = 1.41421356237309504880;

/// B^T of six numbers, `step` apart, to six numbers as far apart.
template <class Acc>
FASTCONV_INLINE void transform_input_line(const simd::Vec<Acc>* d, int64_t step, simd::Vec<Acc>* out,
                                          int64_t out_step) {
  using V = simd::Vec<Acc>;
  const V two_and_half = simd::broadcast(Acc(-2.5)), two = simd::broadcast(Acc(-2)), half = simd::broadcast(Acc(-0.5));
  const V a = simd::broadcast(Acc(kPointA)), b = simd::broadcast(Acc(kPointB));
  const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const V even_a = simd::fma<Acc>(two, d2, d4), odd_a = simd::fma<Acc>(two, d1, d3);
  const V even_b = simd::fma<Acc>(half, d2, d4), odd_b = simd::fma<Acc>(half, d1, d3);
  out[0] = simd::fma<Acc>(two_and_half, d2, d0 + d4);
  out[out_step] = simd::fma<Acc>(a, odd_a, even_a);
  out[2 * out_step] = simd::fma<Acc>(-a, odd_a, even_a);
  out[3 * out_step] = simd::fma<Acc>(b, odd_b, even_b);
  out[4 * out_step] = simd::fma<Acc>(-b, odd_b, even_b);
  out[5 * out_step] = simd::fma<Acc>(two_and_half, d3, d1 + d5);
}

/// A^T of six numbers to four.
template <class Acc>
FASTCONV_INLINE void transform_output_line(const simd::Vec<Acc>* m, int64_t step, simd::Vec<Acc>* out,
                                           int64_t out_step) {
  using V = simd::Vec<Acc>;
  const V a = simd::broadcast(Acc(kPointA)), b = simd::broadcast(Acc(kPointB));
  const V half = simd::broadcast(Acc(0.5)), two = simd::broadcast(Acc(2));
  const V sum_a = m[step] + m[2 * step], difference_a = a * (m[step] - m[2 * step]);
  const V sum_b = m[3 * step] + m[4 * step], difference_b = b * (m[3 * step] - m[4 * step]);
  out[0] = m[0] + sum_a + sum_b;
  out[out_step] = difference_a + difference_b;
  out[2 * out_step] = simd::fma<Acc>(two, sum_b, half * sum_a);
  out[3 * out_step] = simd::fma<Acc>(two, difference_b, simd::fma<Acc>(half, difference_a, m[5 * step]));
}

/// B^T d B of a vector of pieces; d is [row][column], and so is the result.
template <class Acc>
FASTCONV_INLINE void transform_input(const simd::Vec<Acc> (&d)[kWinogradProducts],
                                     simd::Vec<Acc> (&result)[kWinogradProducts]) {
  simd::Vec<Acc> half_way[kWinogradProducts];
#pragma GCC unroll 6
  for (int column = 0; column < 6; ++column) transform_input_line<Acc>(d + column, 6, half_way + column, 6);
#pragma GCC unroll 6
  for (int row = 0; row < 6; ++row) transform_input_line<Acc>(half_way + 6 * row, 1, result + 6 * row, 1);
}

/// A^T m A: [row][column] of 6 x 6 to [row][column] of 4 x 4.
template <class Acc>
FASTCONV_INLINE void transform_output(const simd::Vec<Acc> (&m)[kWinogradProducts], simd::Vec<Acc> (&result)[16]) {
  simd::Vec<Acc> half_way[24];
#pragma GCC unroll 6
  for (int column = 0; column < 6; ++column) transform_output_line<Acc>(m + column, 6, half_way + column, 6);
#pragma GCC unroll 4
  for (int row = 0; row < 4; ++row) transform_output_line<Acc>(half_way + 6 * row, 1, result + 4 * row, 1);
}

/// G of three numbers to six, in float64 as the whole filter transform: it is done once, its rounding counts 36 times.
FASTCONV_INLINE void transform_filter_line(const simd::Vec<double>* g, int64_t step, simd::Vec<double>* out,
                                           int64_t out_step) {
  using V = simd::Vec<double>;
  const auto number = [](double value) { return simd::broadcast<double>(value); };
  const V g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const V even_a = (g0 + number(0.5) * g2) * number(-1 / 1.5), odd_a = number(-kPointA / 1.5) * g1;
  const V even_b = (g0 + number(2) * g2) * number(1 / 6.0), odd_b = number(kPointB / 6) * g1;
  out[0] = g0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = g2;
}

/// G g G^T of a vector of filters.
FASTCONV_INLINE void transform_filter(const simd::Vec<double> (&g)[9], simd::Vec<double> (&result)[kWinogradProducts]) {
  simd::Vec<double> half_way[18];  // [6][3]
#pragma GCC unroll 3
  for (int column = 0; column < 3; ++column) transform_filter_line(g + column, 3, half_way + column, 3);
#pragma GCC unroll 6
  for (int row = 0; row < 6; ++row) transform_filter_line(half_way + 3 * row, 1, result + 6 * row, 1);
}

}  // namespace
}  // namespace fastconv
