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

/// F(4x4, 3x3): each array is [row][column], of vectors of pieces.
struct Winograd4 {
  static constexpr int64_t kOutputs = 4, kInputs = 6, kProducts = 36;

  static constexpr double kPointA = 0.70710678118654752440, kPointB = 1.41421356237309504880;

  /// B^T of six numbers, `step` apart, to six numbers as far apart.
  static FASTCONV_INLINE void transform_input_line(const simd::Vec<float>* d, int64_t step, simd::Vec<float>* out,
                                                   int64_t out_step) {
    using V = simd::Vec<float>;
    const V two_and_half = simd::broadcast(-2.5f), two = simd::broadcast(-2.0f), half = simd::broadcast(-0.5f);
    const V a = simd::broadcast(static_cast<float>(kPointA)), b = simd::broadcast(static_cast<float>(kPointB));
    const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const V even_a = simd::fma<float>(two, d2, d4), odd_a = simd::fma<float>(two, d1, d3);
    const V even_b = simd::fma<float>(half, d2, d4), odd_b = simd::fma<float>(half, d1, d3);
    out[0] = simd::fma<float>(two_and_half, d2, d0 + d4);
    out[out_step] = simd::fma<float>(a, odd_a, even_a);
    out[2 * out_step] = simd::fma<float>(-a, odd_a, even_a);
    out[3 * out_step] = simd::fma<float>(b, odd_b, even_b);
    out[4 * out_step] = simd::fma<float>(-b, odd_b, even_b);
    out[5 * out_step] = simd::fma<float>(two_and_half, d3, d1 + d5);
  }

  /// A^T of six numbers to four.
  static FASTCONV_INLINE void transform_output_line(const simd::Vec<float>* m, int64_t step, simd::Vec<float>* out,
                                                    int64_t out_step) {
    using V = simd::Vec<float>;
    const V a = simd::broadcast(static_cast<float>(kPointA)), b = simd::broadcast(static_cast<float>(kPointB));
    const V half = simd::broadcast(0.5f), two = simd::broadcast(2.0f);
    const V sum_a = m[step] + m[2 * step], difference_a = a * (m[step] - m[2 * step]);
    const V sum_b = m[3 * step] + m[4 * step], difference_b = b * (m[3 * step] - m[4 * step]);
    out[0] = m[0] + sum_a + sum_b;
    out[out_step] = difference_a + difference_b;
    out[2 * out_step] = simd::fma<float>(two, sum_b, half * sum_a);
    out[3 * out_step] = simd::fma<float>(two, difference_b, simd::fma<float>(half, difference_a, m[5 * step]));
  }

  /// B^T d B of a vector of pieces; d is [row][column], and so is the result.
  static FASTCONV_INLINE void transform_input(const simd::Vec<float> (&d)[kProducts],
                                              simd::Vec<float> (&result)[kProducts]) {
    simd::Vec<float> half_way[kProducts];
#pragma GCC unroll 6
    for (int column = 0; column < 6; ++column) transform_input_line(d + column, 6, half_way + column, 6);
#pragma GCC unroll 6
    for (int row = 0; row < 6; ++row) transform_input_line(half_way + 6 * row, 1, result + 6 * row, 1);
  }

  /// A^T m A: [row][column] of 6 x 6 to [row][column] of 4 x 4.
  static FASTCONV_INLINE void transform_output(const simd::Vec<float> (&m)[kProducts], simd::Vec<float> (&result)[16]) {
    simd::Vec<float> half_way[24];
#pragma GCC unroll 6
    for (int column = 0; column < 6; ++column) transform_output_line(m + column, 6, half_way + column, 6);
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) transform_output_line(half_way + 6 * row, 1, result + 4 * row, 1);
  }

  /// G of three numbers to six, in float64 as the whole filter transform: it is done once, its rounding counts 36
  /// times.
  static FASTCONV_INLINE void transform_filter_line(const simd::Vec<double>* g, int64_t step, simd::Vec<double>* out,
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
  static FASTCONV_INLINE void transform_filter(const simd::Vec<double> (&g)[9],
                                               simd::Vec<double> (&result)[kProducts]) {
    simd::Vec<double> half_way[18];  // [6][3]
#pragma GCC unroll 3
    for (int column = 0; column < 3; ++column) transform_filter_line(g + column, 3, half_way + column, 3);
#pragma GCC unroll 6
    for (int row = 0; row < 6; ++row) transform_filter_line(half_way + 3 * row, 1, result + 6 * row, 1);
  }
};

/// F(2x2, 3x3) with the points 0, 1, -1, infinity. 16 products for 4 outputs, and 1.8 times the weight's memory instead
/// of 4. Each output comes from products of what it reads, and nothing else.
struct Winograd2 {
  static constexpr int64_t kOutputs = 2, kInputs = 4, kProducts = 16;

  static FASTCONV_INLINE void transform_input_line(const simd::Vec<float>* d, int64_t step, simd::Vec<float>* out,
                                                   int64_t out_step) {
    const simd::Vec<float> d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    out[0] = d0 - d2;
    out[out_step] = d1 + d2;
    out[2 * out_step] = d2 - d1;
    out[3 * out_step] = d1 - d3;
  }

  static FASTCONV_INLINE void transform_output_line(const simd::Vec<float>* m, int64_t step, simd::Vec<float>* out,
                                                    int64_t out_step) {
    const simd::Vec<float> m1 = m[step], m2 = m[2 * step];
    out[0] = m[0] + m1 + m2;
    out[out_step] = m1 - m2 - m[3 * step];
  }

  static FASTCONV_INLINE void transform_input(const simd::Vec<float> (&d)[kProducts],
                                              simd::Vec<float> (&result)[kProducts]) {
    simd::Vec<float> half_way[kProducts];
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) transform_input_line(d + column, 4, half_way + column, 4);
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) transform_input_line(half_way + 4 * row, 1, result + 4 * row, 1);
  }

  static FASTCONV_INLINE void transform_output(const simd::Vec<float> (&m)[kProducts], simd::Vec<float> (&result)[4]) {
    simd::Vec<float> half_way[8];
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) transform_output_line(m + column, 4, half_way + column, 4);
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) transform_output_line(half_way + 4 * row, 1, result + 2 * row, 1);
  }

  static FASTCONV_INLINE void transform_filter_line(const simd::Vec<double>* g, int64_t step, simd::Vec<double>* out,
                                                    int64_t out_step) {
    const simd::Vec<double> half = simd::broadcast<double>(0.5), even = (g[0] + g[2 * step]) * half,
                            odd = g[step] * half;
    out[0] = g[0];
    out[out_step] = even + odd;
    out[2 * out_step] = even - odd;
    out[3 * out_step] = g[2 * step];
  }

  static FASTCONV_INLINE void transform_filter(const simd::Vec<double> (&g)[9],
                                               simd::Vec<double> (&result)[kProducts]) {
    simd::Vec<double> half_way[12];  // [4][3]
#pragma GCC unroll 3
    for (int column = 0; column < 3; ++column) transform_filter_line(g + column, 3, half_way + column, 3);
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) transform_filter_line(half_way + 3 * row, 1, result + 4 * row, 1);
  }
};

}  // namespace
}  // namespace fastconv
