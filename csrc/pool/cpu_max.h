// Max pooling forward, and the two ops that read its offsets: torch's indices, and the pick that is its tangent.
#pragma once

#include "pool/cpu_windows.h"

namespace fastconv {
namespace {

template <class T>
struct MaxSink {
  T* y;

  template <class Reduction>
  FASTCONV_INLINE void put(const Reduction& reduction, int64_t index, int64_t live, int64_t, int64_t,
                           bool whole) const {
    if (whole) simd::store<T>(y + index, reduction.value);
    else simd::store_first<T>(y + index, reduction.value, live);
  }
};

template <class T, class Offset>
struct MaxOffsetSink {
  T* y;
  Offset* offsets;

  template <class Reduction>
  FASTCONV_INLINE void put(const Reduction& reduction, int64_t index, int64_t live, int64_t, int64_t,
                           bool whole) const {
    using Acc = acc_t<T>;
    if (whole) {
      simd::store<T>(y + index, reduction.value);
      store_offsets<Acc>(offsets + index, reduction.offset);
    } else {
      simd::store_first<T>(y + index, reduction.value, live);
      store_first_offsets<Acc>(offsets + index, reduction.offset, live);
    }
  }
};

template <class Reduction, class T, class Sink>
void walk(const PoolProblem& p, const T* x, const Sink& sink) {
  if (p.layout == Layout::nchw) walk_nchw_any<Reduction>(p, x, sink);
  else walk_nhwc<Reduction>(p, x, sink);
}

template <class T>
void max_pool(const PoolProblem& p, const T* x, T* y, void* offsets) {
  using Acc = acc_t<T>;
  if (offsets == nullptr) return walk<RunningMax<Acc>>(p, x, MaxSink<T>{y});
  if (offsets_fit_byte(p))
    return walk<RunningMaxOffset<Acc>>(p, x, MaxOffsetSink<T, uint8_t>{y, static_cast<uint8_t*>(offsets)});
  walk<RunningMaxOffset<Acc>>(p, x, MaxOffsetSink<T, int32_t>{y, static_cast<int32_t*>(offsets)});
}

/// Calls body(element, h, w) for every output element with the input position its offset names. The position is outside
/// the input where a window holds no element of it, which only dilation with padding can do.
template <class Offset, class Body>
FASTCONV_INLINE void for_each_winner(const PoolProblem& p, const Offset* offsets, const Body& body) {
  const int64_t rows = p.p(), columns = p.q();
  const bool channels_first = p.layout == Layout::nchw;
  // The innermost axis in memory, and how many of them there are.
  const int64_t inner = channels_first ? columns : p.c;
  const int64_t outer = channels_first ? p.n * p.c * rows : p.n * rows * columns;
  parallel_for(0, outer, grain_for(4 * inner), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t i = channels_first ? line % rows : line / columns % rows;
      const int64_t image_plane = channels_first ? line / rows : line / columns / rows;
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t element = line * inner + j, q = channels_first ? j : line % columns;
        const int64_t tap = offsets[element], r = tap / p.s, s = tap - r * p.s;
        const int64_t h = i * p.stride.h - p.padding.h + r * p.dilation.h;
        const int64_t w = q * p.stride.w - p.padding.w + s * p.dilation.w;
        body(element, image_plane, channels_first ? 0 : j, h, w);
      }
    }
  });
}

template <class Offset>
void max_indices(const PoolProblem& p, const Offset* offsets, int64_t* indices) {
  for_each_winner(p, offsets,
                  [&](int64_t element, int64_t, int64_t, int64_t h, int64_t w) { indices[element] = h * p.w + w; });
}

template <class T, class Offset>
void max_gather(const PoolProblem& p, const T* x, const Offset* offsets, T* y) {
  const Strides4 strides = p.input_strides();
  const int64_t outer_stride = p.layout == Layout::nchw ? strides.c : strides.n;
  const T nothing = simd::narrow<T>(acc_t<T>(0));
  for_each_winner(p, offsets, [&](int64_t element, int64_t image_plane, int64_t channel, int64_t h, int64_t w) {
    const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
    y[element] = inside ? x[image_plane * outer_stride + channel + h * strides.h + w * strides.w] : nothing;
  });
}

}  // namespace
}  // namespace fastconv
