// The mean of each plane, and its adjoint: average pooling to 1 x 1, where a window is all there is.
#pragma once

#include "pool/cpu_windows.h"

namespace fastconv {
namespace {

/// Sums are kept in kSums vectors, closed every kBlock vectors into a subtotal, and that every kBlock closings into the
/// total, so that rounding grows with the logarithm of a plane's size and not with the size.
inline constexpr int64_t kSums = 4, kBlock = 128;

/// The sum of `count` vectors' worth of elements, count at most kBlock.
template <class T>
FASTCONV_INLINE simd::Vec<acc_t<T>> sum_block(const T* x, int64_t count) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) sums[v] += simd::load(x + (i + v) * kLane);
  for (; i < count; ++i) sums[0] += simd::load(x + i * kLane);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
FASTCONV_INLINE acc_t<T> sum_line(const T* x, int64_t count) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t vectors = count / kLane;
  simd::Vec<Acc> total = {};
  for (int64_t i = 0; i < vectors;) {
    simd::Vec<Acc> subtotal = {};
    for (const int64_t last = min_of(vectors, i + kBlock * kBlock); i < last; i += kBlock)
      subtotal += sum_block(x + i * kLane, min_of(kBlock, last - i));
    total += subtotal;
  }
  Acc result = simd::sum<Acc>(total);
  for (int64_t i = vectors * kLane; i < count; ++i) result += simd::widen(x[i]);
  return result;
}

template <class T>
void global_average_nchw(int64_t planes, int64_t plane, const T* x, T* y) {
  parallel_for(0, planes, grain_for(plane), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      y[i] = simd::narrow<T>(sum_line(x + i * plane, plane) / static_cast<acc_t<T>>(plane));
  });
}

/// kVectors vectors of channels summed over a plane, or the first `live` lanes of one.
template <int kVectors, class T>
FASTCONV_INLINE void average_channels(const T* x, int64_t stride, int64_t plane, int64_t live, T* y) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> totals[kVectors] = {};
  // Three levels: pixels into sums, sums into subtotals, subtotals into totals.
  for (int64_t pixel = 0; pixel < plane;) {
    simd::Vec<Acc> subtotals[kVectors] = {};
    for (const int64_t last = min_of(plane, pixel + kBlock * kBlock); pixel < last;) {
      simd::Vec<Acc> sums[kVectors] = {};
      for (const int64_t stop = min_of(last, pixel + kBlock); pixel < stop; ++pixel)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sums[v] +=
              live >= kLane ? simd::load(x + pixel * stride + v * kLane) : simd::load_first(x + pixel * stride, live);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) subtotals[v] += sums[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) totals[v] += subtotals[v];
  }
  const auto divisor = simd::broadcast<Acc>(static_cast<Acc>(plane));
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (live >= kLane) simd::store<T>(y + v * kLane, totals[v] / divisor);
    else simd::store_first<T>(y, totals[v] / divisor, live);
  }
}

template <class T>
void global_average_nhwc(int64_t n, int64_t c, int64_t plane, const T* x, T* y) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  const int64_t blocks = ceil_div(c, 4 * kLane);
  parallel_for(0, n * blocks, grain_for(plane * 4 * kLane), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / blocks, first = item % blocks * 4 * kLane, last = min_of(c, first + 4 * kLane);
      const T* source = x + image * plane * c;
      T* target = y + image * c;
      if (last - first == 4 * kLane) {
        average_channels<4>(source + first, c, plane, kLane, target + first);
        continue;
      }
      for (int64_t channel = first; channel < last; channel += kLane)
        average_channels<1>(source + channel, c, plane, min_of(kLane, last - channel), target + channel);
    }
  });
}

/// Both layouts: of NHWC a pixel's channels are written together, of NCHW a plane's pixels.
template <class T>
void global_average_backward(int64_t n, int64_t c, int64_t plane, Layout layout, const T* grad, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const Acc divisor = static_cast<Acc>(plane);
  if (layout == Layout::nchw) {
    parallel_for(0, n * c, grain_for(plane), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Acc share = simd::widen(grad[i]) / divisor;
        T* target = grad_input + i * plane;
        int64_t pixel = 0;
        for (; pixel + kLane <= plane; pixel += kLane) simd::store<T>(target + pixel, simd::broadcast<Acc>(share));
        for (; pixel < plane; ++pixel) target[pixel] = simd::narrow<T>(share);
      }
    });
    return;
  }
  parallel_for(0, n * plane, grain_for(c), [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const T* source = grad + pixel / plane * c;
      T* target = grad_input + pixel * c;
      int64_t i = 0;
      for (; i + kLane <= c; i += kLane)
        simd::store<T>(target + i, simd::load(source + i) / simd::broadcast<Acc>(divisor));
      for (; i < c; ++i) target[i] = simd::narrow<T>(simd::widen(source[i]) / divisor);
    }
  });
}

template <class T>
void global_average(int64_t n, int64_t c, int64_t plane, Layout layout, const T* x, T* y) {
  if (layout == Layout::nchw) global_average_nchw(n * c, plane, x, y);
  else global_average_nhwc(n, c, plane, x, y);
}

}  // namespace
}  // namespace fastconv
