// energies[image][pixel]: the sum of squares over all channels, by the same sums whatever the number of threads. What
// Winograd's condition (cpu_winograd_condition.h) is about.
#pragma once

#include "common/parallel.h"
#include "common/simd/simd.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

template <class T>
FASTCONV_INLINE float pixel_energy(const T* pixel, int64_t channels) {
  constexpr int64_t kLane = simd::kLanes<float>;
  auto even = simd::zero<float>(), odd = simd::zero<float>();
  int64_t c = 0;
  for (; c + 2 * kLane <= channels; c += 2 * kLane) {
    const auto first = simd::load(pixel + c), second = simd::load(pixel + c + kLane);
    even = simd::fma<float>(first, first, even), odd = simd::fma<float>(second, second, odd);
  }
  for (; c < channels; c += kLane) {
    const auto rest = simd::load_first(pixel + c, min_of(kLane, channels - c));
    even = simd::fma<float>(rest, rest, even);
  }
  return simd::sum<float>(even + odd);
}

template <class T>
void pixel_energies(const GemmConv& p, Layout layout, float* energies) {
  constexpr int64_t kLane = simd::kLanes<float>, kChunk = 1024;  // pixels whose sums stay in L1 under all channels
  const int64_t plane = p.h * p.w, chunks = ceil_div(plane, kChunk);
  parallel_for(0, p.n * chunks, ceil_div(32768, min_of(plane, kChunk) * p.c), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / chunks, first = index % chunks * kChunk, count = min_of(kChunk, plane - first);
      const T* x = static_cast<const T*>(p.x) + image * p.x_strides.n + first * p.x_strides.w;
      float* sums = energies + image * plane + first;
      if (layout == Layout::nhwc) {
        for (int64_t i = 0; i < count; ++i) sums[i] = pixel_energy(x + i * p.x_strides.w, p.c);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) sums[i] = 0;
      for (int64_t c = 0; c < p.c; ++c, x += p.x_strides.c) {
        int64_t i = 0;
        for (; i + kLane <= count; i += kLane) {
          const auto value = simd::load(x + i);
          simd::store<float>(sums + i, simd::fma<float>(value, value, simd::load(sums + i)));
        }
        for (; i < count; ++i) sums[i] += simd::widen(x[i]) * simd::widen(x[i]);
      }
    }
  });
}

}  // namespace
}  // namespace fastconv
