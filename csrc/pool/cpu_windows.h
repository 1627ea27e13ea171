// The walk over windows that every pooling forward shares; what happens inside a window is a reduction of cpu_reduce.h,
// what becomes of its result is a sink.
//
// NCHW: lanes are neighbouring outputs of a row, so taps of stride 2 are de-interleaved from two vectors. Lanes beyond
// a row's end may read the row after it, never beyond the tensor; windows that hang over an edge are staged into a
// small buffer filled with the reduction's identity, so the inner loop has no bounds checks. NHWC: lanes are channels,
// a window is a rectangle of pixels clipped to the image.
//
// A sink has put(reduction, index, live, whole): `live` results belong at element `index` of the output, and `whole`
// says that a whole vector may be written there, because what spills over is written later by the same thread.
#pragma once

#include "common/parallel.h"
#include "pool/cpu_reduce.h"
#include "pool/pool.h"

namespace fastconv {
namespace {

/// Chunks of outputs worth a thread's wake-up, from the elements that each output reads.
FASTCONV_INLINE int64_t grain_for(int64_t elements_per_item) { return 1 + 32768 / (elements_per_item + 1); }

/// The taps of a window along one axis that fall inside the input: [begin, end).
struct TapRange {
  int64_t begin, end;
};
FASTCONV_INLINE TapRange taps_inside(int64_t start, int64_t size, int64_t window, int64_t dilation) {
  // Most windows are inside altogether; the others pay for a division or two.
  if (start >= 0 && start + (window - 1) * dilation < size) return {0, window};
  const int64_t begin = start >= 0 ? 0 : ceil_div(-start, dilation);
  const int64_t end = start >= size ? 0 : min_of(window, ceil_div(size - start, dilation));
  return {begin, max_of(begin, end)};
}

// ---------------------------------------------------------------- NCHW

/// Window rows as the inner loop sees them: `rows` rows, `row_stride` elements apart, from the first tap of lane 0.
template <class T>
struct WindowRows {
  const T* first;
  int64_t rows, row_stride;
  int64_t tap;  // number of the first row's first tap
};

/// Lanes kStep elements apart (0: `step`, known at run time).
template <int kStep, class T>
FASTCONV_INLINE simd::Vec<acc_t<T>> load_lanes(const T* source, int64_t step) {
  if constexpr (kStep == 1) return simd::load(source);
  else if constexpr (kStep == 2)
    return even_lanes_overlapped<acc_t<T>>(simd::load(source), simd::load(source + simd::kLanes<acc_t<T>> - 1));
  else return simd::load_strided(source, step);
}

/// kTaps taps to a row (0: p.s). With kStep 2 neighbouring taps share their loads, so dilation.w must be 1.
template <int kStep, int kTaps, class T, class Reduction>
FASTCONV_INLINE void reduce_rows(const PoolProblem& p, const WindowRows<T>& window, Reduction& reduction) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  const int64_t taps = kTaps > 0 ? kTaps : p.s;
  for (int64_t r = 0; r < window.rows; ++r) {
    const T* row = window.first + r * window.row_stride;
    const int64_t tap = window.tap + r * taps;
    int64_t s = 0;
    if constexpr (kStep == 2) {
#pragma GCC unroll 2
      for (; s + 2 <= taps; s += 2) {
        const auto a = simd::load(row + s), b = simd::load(row + s + kLane);
        reduction.take(even_lanes<acc_t<T>>(a, b), tap + s);
        reduction.take(odd_lanes<acc_t<T>>(a, b), tap + s + 1);
      }
    }
#pragma GCC unroll 3
    for (; s < taps; ++s) reduction.take(load_lanes<kStep>(row + s * p.dilation.w, p.stride.w), tap + s);
  }
}

/// A copy of some window rows in which columns outside the input hold the reduction's identity.
template <class T>
class Staging {
 public:
  Staging(const PoolProblem& p, int64_t lanes)
      // One more column: de-interleaving reads whole pairs.
      : columns_((lanes - 1) * p.stride.w + (p.s - 1) * p.dilation.w + 2),
        buffer_(p.r * columns_ * static_cast<int64_t>(sizeof(T))) {}

  int64_t columns() const { return columns_; }

  /// `column` is the input column of lane 0's first tap; it may lie outside.
  WindowRows<T> fill(const PoolProblem& p, const WindowRows<T>& window, int64_t column, T identity) const {
    T* target = buffer_.template as<T>();
    const int64_t begin = min_of(columns_, max_of(0, -column)), end = max_of(begin, min_of(columns_, p.w - column));
    for (int64_t r = 0; r < window.rows; ++r, target += columns_) {
      const T* source = window.first + r * window.row_stride;
      for (int64_t i = 0; i < begin; ++i) target[i] = identity;
      for (int64_t i = begin; i < end; ++i) target[i] = source[i];
      for (int64_t i = end; i < columns_; ++i) target[i] = identity;
    }
    return {buffer_.template as<T>(), window.rows, columns_, window.tap};
  }

 private:
  int64_t columns_;
  Scratch buffer_;
};

/// The first tap inside the input for each of the lanes from output column q, added to the number of the row's first.
template <class Acc>
Offsets<Acc> first_taps(const PoolProblem& p, int64_t q, int64_t tap) {
  Offsets<Acc> result;
  for (int64_t lane = 0; lane < simd::kLanes<Acc>; ++lane) {
    const int64_t start = (q + lane) * p.stride.w - p.padding.w;
    result[lane] =
        static_cast<typename OffsetLanes<Acc>::Lane>(tap + (start >= 0 ? 0 : ceil_div(-start, p.dilation.w)));
  }
  return result;
}

template <int kStep, int kTaps, class Reduction, class T, class Sink>
void walk_nchw(const PoolProblem& p, const T* x, const Sink& sink) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.p(), columns = p.q(), planes = p.n * p.c;
  const T* x_end = x + planes * p.h * p.w;
  const T identity = simd::narrow<T>(Reduction::kIdentity);
  parallel_for(0, planes * rows, grain_for(columns * p.r * p.s), [&](int64_t begin, int64_t end) {
    const Staging<T> staging(p, kLane);
    const int64_t out_end = end * columns;
    for (int64_t row = begin, plane = begin / rows, i = begin % rows; row < end; ++row) {
      const int64_t start = i * p.stride.h - p.padding.h;
      const TapRange taps = taps_inside(start, p.h, p.r, p.dilation.h);
      const T* first = x + (plane * p.h + start + taps.begin * p.dilation.h) * p.w;
      const int64_t row_stride = p.dilation.h * p.w, window_rows = taps.end - taps.begin;
      for (int64_t q = 0; q < columns; q += kLane) {
        const int64_t live = min_of(kLane, columns - q), index = row * columns + q;
        const int64_t column = q * p.stride.w - p.padding.w;
        const int64_t last_live = column + (live - 1) * p.stride.w + (p.s - 1) * p.dilation.w;
        WindowRows<T> window{first + column, window_rows, row_stride, taps.begin * p.s};
        Reduction reduction;
        const int64_t reach = column + (window_rows - 1) * row_stride + staging.columns();
        if (column >= 0 && last_live < p.w && reach <= x_end - first) {
          reduction.start(broadcast_offset<Acc>(window.tap));
        } else {
          const auto firsts = first_taps<Acc>(p, q, window.tap);
          reduction.start(kStep == 2 ? unpair(firsts) : firsts);
          window = staging.fill(p, window, column, identity);
        }
        reduce_rows<kStep, kTaps>(p, window, reduction);
        if constexpr (kStep == 2) reduction.reorder();
        sink.put(reduction, index, live, i, q, index + kLane <= out_end);
      }
      if (++i == rows) i = 0, ++plane;
    }
  });
}

template <class Reduction, class T, class Sink>
void walk_nchw_any(const PoolProblem& p, const T* x, const Sink& sink) {
  if (p.stride.w == 2 && p.dilation.w == 1) {
    if (p.s == 2) return walk_nchw<2, 2, Reduction>(p, x, sink);
    if (p.s == 3) return walk_nchw<2, 3, Reduction>(p, x, sink);
    return walk_nchw<2, 0, Reduction>(p, x, sink);
  }
  if (p.stride.w == 1) return walk_nchw<1, 0, Reduction>(p, x, sink);
  return walk_nchw<0, 0, Reduction>(p, x, sink);
}

// ---------------------------------------------------------------- NHWC

/// A rectangle of pixels: `first` is channel 0 of its first pixel.
template <class T>
struct WindowPixels {
  const T* first;
  int64_t rows, row_stride, columns, column_stride;
  int64_t tap, tap_row_stride;  // numbers of the first tap, and from a row to the next
};

/// kVectors vectors of channels from `channel`, or the first `live` lanes of one.
template <int kVectors, class Reduction, class T, class Put>
FASTCONV_INLINE void reduce_channels(const WindowPixels<T>& window, int64_t channel, int64_t live, const Put& put) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  Reduction reductions[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) reductions[v].start(broadcast_offset<Acc>(window.tap));
  for (int64_t r = 0; r < window.rows; ++r) {
    const T* pixel = window.first + r * window.row_stride + channel;
    const int64_t tap = window.tap + r * window.tap_row_stride;
    for (int64_t s = 0; s < window.columns; ++s, pixel += window.column_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        reductions[v].take(live >= kLane ? simd::load(pixel + v * kLane) : simd::load_first(pixel, live), tap + s);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) put(reductions[v], channel + v * kLane);
}

template <class Reduction, class T, class Put>
FASTCONV_INLINE void reduce_pixel(const WindowPixels<T>& window, int64_t channels, const Put& put) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + 4 * kLane <= channels; c += 4 * kLane) reduce_channels<4, Reduction>(window, c, kLane, put);
  for (; c + kLane <= channels; c += kLane) reduce_channels<1, Reduction>(window, c, kLane, put);
  if (c == channels) return;
  // The last channels again with some before them: the same result written twice is cheaper than a masked store.
  if (channels >= kLane) reduce_channels<1, Reduction>(window, channels - kLane, kLane, put);
  else reduce_channels<1, Reduction>(window, 0, channels, put);
}

template <class Reduction, class T, class Sink>
void walk_nhwc(const PoolProblem& p, const T* x, const Sink& sink) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  const int64_t rows = p.p(), columns = p.q();
  parallel_for(0, p.n * rows * columns, grain_for(p.c * p.r * p.s), [&](int64_t begin, int64_t end) {
    int64_t q = begin % columns, i = begin / columns % rows, image = begin / columns / rows;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t row = i * p.stride.h - p.padding.h, column = q * p.stride.w - p.padding.w;
      const TapRange r = taps_inside(row, p.h, p.r, p.dilation.h), s = taps_inside(column, p.w, p.s, p.dilation.w);
      const int64_t first_row = row + r.begin * p.dilation.h, first_column = column + s.begin * p.dilation.w;
      const WindowPixels<T> window{x + ((image * p.h + first_row) * p.w + first_column) * p.c,
                                   r.end - r.begin,
                                   p.dilation.h * p.w * p.c,
                                   s.end - s.begin,
                                   p.dilation.w * p.c,
                                   r.begin * p.s + s.begin,
                                   p.s};
      reduce_pixel<Reduction>(window, p.c, [&](const Reduction& reduction, int64_t channel) {
        sink.put(reduction, pixel * p.c + channel, min_of(kLane, p.c), i, q, p.c >= kLane);
      });
      if (++q < columns) continue;
      q = 0;
      if (++i == rows) i = 0, ++image;
    }
  });
}

}  // namespace
}  // namespace fastconv
