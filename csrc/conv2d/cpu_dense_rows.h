// One pixel an image: a fully connected layer. Weights are read once, where they are, so that their memory is the
// bound.
//
// y[n, m] is the dot product of two rows, lanes along the depth. A register tile of outputs and images shares their
// loads; a group of outputs takes the depth in chunks, so that the images' chunk and the outputs' stay in L2.
#pragma once

#include "conv2d/cpu_channel_lanes.h"

namespace fastconv {
namespace {

#if defined(FASTCONV_SIMD_AVX512) || defined(FASTCONV_SIMD_NEON)
inline constexpr int kDenseImages = 6;  // 24 of 32 registers hold sums
#else
inline constexpr int kDenseImages = 2;
#endif
inline constexpr int kDenseOutputs = 4;
inline constexpr int kDenseGroup = 64;        // outputs
inline constexpr int64_t kDenseDepth = 4096;  // elements of a chunk

/// Weights that a tile fetches while it computes: `rows` rows, at the depth where it is. A tile that is the first to
/// read its own rows fetches them a little ahead, since prefetchers of CPUs stop at the end of a page; those that
/// follow, for other images, fetch the next rows, so that memory never waits for products.
template <class T>
struct DenseFetch {
  static constexpr int64_t kAhead = 256;  // elements
  const T* weight;
  int64_t rows;
};

/// For many images panels pay for themselves.
inline bool dense_rows_serve(const GemmConv& p) {
  constexpr int64_t kImages = 32;
  return p.i * p.j == 1 && p.tap_count == 1 && p.n <= kImages && p.h * p.w == 1 && p.taps[0].dh == 0 &&
         p.taps[0].dw == 0 && p.x_strides.c == 1 && p.y_strides.c == 1 && p.weight_c_stride == 1;
}

/// sums[image * kDenseGroup + output] (+)= products of `depth` elements.
template <class T, int kOutputs, int kImages>
__attribute__((noinline)) void dense_tile(const T* weight, int64_t weight_stride, const T* x, int64_t x_stride,
                                          int64_t depth, bool accumulate, const DenseFetch<T>& fetch, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> total[kOutputs][kImages];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int n = 0; n < kImages; ++n) total[o][n] = simd::zero<Acc>();
  const auto step = [&](int64_t d, const auto& read) {
    simd::Vec<Acc> w[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      if (o < fetch.rows) __builtin_prefetch(fetch.weight + o * weight_stride + d, 0, 2);
      w[o] = read(weight + o * weight_stride + d);
    }
#pragma GCC unroll 8
    for (int n = 0; n < kImages; ++n) {
      const auto value = read(x + n * x_stride + d);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) total[o][n] = simd::fma<Acc>(w[o], value, total[o][n]);
    }
  };
  int64_t d = 0;
  for (; d + kLane <= depth; d += kLane) step(d, [](const T* from) { return simd::load(from); });
  if (d < depth) step(d, [&](const T* from) { return simd::load_first(from, depth - d); });
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int n = 0; n < kImages; ++n) {
      Acc& sum = sums[n * kDenseGroup + o];
      sum = simd::sum<Acc>(total[o][n]) + (accumulate ? sum : Acc{});
    }
}

/// A tile's function by its images.
template <class T, int kOutputs, int kImages = kDenseImages>
void dense_images(int64_t images, const T* weight, int64_t weight_stride, const T* x, int64_t x_stride, int64_t depth,
                  bool accumulate, const DenseFetch<T>& fetch, acc_t<T>* sums) {
  if (images == kImages)
    return dense_tile<T, kOutputs, kImages>(weight, weight_stride, x, x_stride, depth, accumulate, fetch, sums);
  if constexpr (kImages > 1)
    dense_images<T, kOutputs, kImages - 1>(images, weight, weight_stride, x, x_stride, depth, accumulate, fetch, sums);
}

/// Outputs [first, first + count) of a group of the convolution.
template <class T>
void convolve_dense_group(const GemmConv& p, int64_t group, int64_t first, int64_t count, acc_t<T>* sums) {
  constexpr int64_t kColumns = kTileColumns<acc_t<T>>;
  const T* weight = static_cast<const T*>(p.weight) + group * p.weight_group_stride + first * p.weight_m_stride +
                    p.taps[0].weight_offset_elems;
  const T* x = static_cast<const T*>(p.x) + group * p.c;
  const int64_t passes = ceil_div(p.n, kDenseImages), images = ceil_div(p.n, passes);
  for (int64_t begin = 0; begin == 0 || begin < p.c; begin += kDenseDepth) {
    const int64_t depth = min_of(kDenseDepth, p.c - begin);
    for (int64_t o = 0; o < count;) {
      const int64_t outputs = count - o >= kDenseOutputs ? kDenseOutputs : 1;
      const T* rows = weight + o * p.weight_m_stride + begin;
      // Later passes share the next rows.
      const int64_t shared = passes > 1 ? ceil_div(outputs, passes - 1) : 0;
      for (int64_t n = 0; n < p.n; n += images) {
        const int64_t next = outputs + shared * (n / images - 1);
        const DenseFetch<T> fetch = n == 0 ? DenseFetch<T>{rows + DenseFetch<T>::kAhead, outputs}
                                           : DenseFetch<T>{rows + next * p.weight_m_stride, shared};
        const auto function = outputs == 1 ? &dense_images<T, 1> : &dense_images<T, kDenseOutputs>;
        function(min_of(images, p.n - n), rows, p.weight_m_stride, x + n * p.x_strides.n + begin, p.x_strides.n, depth,
                 begin > 0, fetch, sums + n * kDenseGroup + o);
      }
      o += outputs;
    }
  }
  for (int64_t n = 0; n < p.n; ++n) {
    const int64_t y_offset = p.y_offset + n * p.y_strides.n;
    for (int64_t o = 0; o < count; o += kColumns)
      store_channel_tile<T>(p, &y_offset, sums + n * kDenseGroup + o, kDenseGroup, group * p.m + first + o, 1,
                            min_of(kColumns, count - o));
  }
}

template <class T>
void convolve_dense_rows(const GemmConv& p) {
  const int64_t per_group = ceil_div(p.m, kDenseGroup);
  parallel_for(0, p.groups * per_group, ceil_div(1 << 16, p.c * kDenseGroup + 1), [&](int64_t begin, int64_t end) {
    Scratch sums(p.n * kDenseGroup * static_cast<int64_t>(sizeof(acc_t<T>)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % per_group * kDenseGroup;
      convolve_dense_group<T>(p, task / per_group, first, min_of(kDenseGroup, p.m - first), sums.as<acc_t<T>>());
    }
  });
}

}  // namespace
}  // namespace fastconv
