// Kernels for NHWC: channels in lanes, a run of kTileColumns output columns at a time, so that a loaded input vector
// serves every window of the run that it belongs to. A 3x3 window over 7 columns costs 27 loads of input and 9 of
// weights for 63 fused multiply-adds. Input comes through a table of pointers, one per element of the run's window, in
// which padding points at zeros: borders cost nothing and need no code.
#pragma once

#include "conv2d/cpu_transpose.h"
#include "depthwise/cpu_pass.h"

namespace fastconv {
namespace {

inline constexpr int kTileColumns = 7;  // 7 sums, 3 weights, 1 input; and 7 divides every width of a 224-pixel network

/// Calls body(channel) for vectors that cover [begin, end); the last one reaches back over its neighbour.
template <int64_t kLane, class Body>
FASTCONV_INLINE void for_channel_vectors(int64_t begin, int64_t end, const Body& body) {
  for (int64_t channel = begin;;) {
    body(channel);
    if (channel + kLane >= end) return;
    channel = min_of(channel + kLane, end - kLane);
  }
}

/// Loads and stores of whole vectors, or of the first `live` lanes where there are fewer channels than lanes.
template <bool kNarrow, class T>
FASTCONV_INLINE simd::Vec<acc_t<T>> load_channels(const T* source, int64_t live) {
  if constexpr (kNarrow) return simd::load_first(source, live);
  else return simd::load(source);
}
template <bool kNarrow, class T>
FASTCONV_INLINE void store_channels(T* target, simd::Vec<acc_t<T>> value, int64_t live) {
  if constexpr (kNarrow) simd::store_first<T>(target, value, live);
  else simd::store<T>(target, value);
}

/// A run of output columns. Tap (r, s) of column j reads channel c at x[r * x_pitch + j * step + s * spacing][c].
template <class X, class Y>
struct ChannelTile {
  using Acc = acc_t<X>;
  const X* const* x;
  int64_t x_pitch, step, spacing;
  int64_t tap_rows, tap_columns;
  const Acc* weights;  // tap (r, s), channel c at weights[r * weight_row + s * weight_column + c]
  int64_t weight_row, weight_column;
  Y* y;
  int64_t y_column, columns;
  int64_t c_begin, c_end;
  const Y* residual;  // laid out as y
  const Acc* scale;
  const Acc* shift;
  Activation activation;
};

template <class X, class Y, bool kNarrow>
FASTCONV_INLINE void put_columns(const ChannelTile<X, Y>& tile, int64_t c, int64_t live,
                                 simd::Vec<acc_t<X>> (&sums)[kTileColumns]) {
  using Acc = acc_t<X>;
  if (tile.scale) {
    const auto scale = load_channels<kNarrow>(tile.scale + c, live);
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) sums[j] = sums[j] * scale;
  }
  if (tile.shift) {
    const auto shift = load_channels<kNarrow>(tile.shift + c, live);
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) sums[j] = sums[j] + shift;
  }
  // What MobileNets have, in registers; the rest one by one.
  const bool whole = tile.columns == kTileColumns && tile.residual == nullptr && tile.activation != Activation::tanh;
  if (whole) [[likely]] {
    if (tile.activation != Activation::none) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileColumns; ++j) sums[j] = simd::activate<Acc>(sums[j], Activation::relu);
    }
    if (tile.activation == Activation::relu6) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileColumns; ++j) sums[j] = simd::activate<Acc>(sums[j], Activation::relu6);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) store_channels<kNarrow>(tile.y + j * tile.y_column + c, sums[j], live);
    return;
  }
  simd::Vec<Acc> values[kTileColumns];  // an index of `sums` that is not a constant would keep it out of registers
#pragma GCC unroll 8
  for (int j = 0; j < kTileColumns; ++j) values[j] = sums[j];
  for (int j = 0; j < tile.columns; ++j) {
    const int64_t offset = j * tile.y_column + c;
    if (tile.residual) values[j] = values[j] + load_channels<kNarrow>(tile.residual + offset, live);
    store_channels<kNarrow>(tile.y + offset, simd::activate<Acc>(values[j], tile.activation), live);
  }
}

template <class X, class Y>
using ChannelKernel = void (*)(const ChannelTile<X, Y>&);

/// Any number of tap rows, kTapColumns columns side by side.
template <class X, class Y, int kTapColumns, int kStep>
void window_tile(const ChannelTile<X, Y>& argument) {
  const ChannelTile<X, Y> tile = argument;  // or gcc reloads it after every store through tile.y
  using Acc = acc_t<X>;
  using V = simd::Vec<Acc>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  for_channel_vectors<kLane>(tile.c_begin, tile.c_end, [&](int64_t c) __attribute__((always_inline)) {
    V sums[kTileColumns] = {};
    const X* const* x = tile.x;
    const Acc* weight = tile.weights + c;
    // Unrolled, gcc would keep the address of every pointer of all rows on the stack: a third more loads.
#pragma GCC unroll 1
    for (int64_t r = 0; r < tile.tap_rows; ++r, x += tile.x_pitch, weight += tile.weight_row) {
      V weights[kTapColumns];
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) weights[s] = simd::load(weight + s * tile.weight_column);
      constexpr int kWidth = (kTileColumns - 1) * kStep + kTapColumns;
#pragma GCC unroll 32
      for (int e = 0; e < kWidth; ++e) {
        const V value = simd::load(x[e] + c);
#pragma GCC unroll 8
        for (int s = 0; s < kTapColumns; ++s) {
          const int j = (e - s) / kStep;
          if (e >= s && (e - s) % kStep == 0 && j < kTileColumns) sums[j] = simd::fma<Acc>(value, weights[s], sums[j]);
        }
      }
    }
    put_columns<X, Y, false>(tile, c, kLane, sums);
  });
}

template <class X, class Y, bool kNarrow>
void any_window_tile(const ChannelTile<X, Y>& argument) {
  const ChannelTile<X, Y> tile = argument;  // or gcc reloads it after every store through tile.y
  using Acc = acc_t<X>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t live = min_of(kLane, tile.c_end - tile.c_begin);
  for_channel_vectors<kLane>(tile.c_begin, tile.c_end, [&](int64_t c) __attribute__((always_inline)) {
    simd::Vec<Acc> sums[kTileColumns] = {};
    for (int64_t r = 0; r < tile.tap_rows; ++r)
      for (int64_t s = 0; s < tile.tap_columns; ++s) {
        const auto weight =
            load_channels<kNarrow>(tile.weights + r * tile.weight_row + s * tile.weight_column + c, live);
        const X* const* x = tile.x + r * tile.x_pitch + s * tile.spacing;
#pragma GCC unroll 8
        for (int j = 0; j < kTileColumns; ++j)
          sums[j] = simd::fma<Acc>(load_channels<kNarrow>(x[j * tile.step] + c, live), weight, sums[j]);
      }
    put_columns<X, Y, kNarrow>(tile, c, live, sums);
  });
}

/// `taps` and `spacing` are those of a row (rows have theirs in the pointer table).
template <class X, class Y>
ChannelKernel<X, Y> channel_kernel(int64_t taps, int64_t spacing, int64_t step, int64_t channels) {
  if (channels < simd::kLanes<acc_t<X>>) return &any_window_tile<X, Y, true>;
  // X and Y differ only for a channel multiplier of 16-bit tensors: not worth kernels of its own.
  if constexpr (__is_same(X, Y)) {
    // The gradient of stride 2 has 1 and 2 taps of 3, 2 and 3 taps of 5.
    if (taps == 1 && step == 1) return &window_tile<X, Y, 1, 1>;
    if (taps == 2 && step == 1 && spacing == 1) return &window_tile<X, Y, 2, 1>;
    if (taps == 3 && step == 1 && spacing == 1) return &window_tile<X, Y, 3, 1>;
    if (taps == 3 && step == 2 && spacing == 1) return &window_tile<X, Y, 3, 2>;
    if (taps == 5 && step == 1 && spacing == 1) return &window_tile<X, Y, 5, 1>;
    if (taps == 5 && step == 2 && spacing == 1) return &window_tile<X, Y, 5, 2>;
  }
  return &any_window_tile<X, Y, false>;
}

/// An image with its channels side by side. Rows may be those of a strip: `data` is where row 0 would be.
template <class X>
struct ChannelImage {
  const X* data;
  Size2 size;
  int64_t channels;
};

/// How many channels a task takes at a time, if the rows of a window take `row_bytes` per channel. They stay in L1
/// where that leaves blocks worth having. Where it does not they stay in L2, and the more channels a block has, the
/// longer are the runs that are read in order.
FASTCONV_INLINE int64_t channels_per_block(int64_t row_bytes) {
  constexpr int64_t kL1Bytes = 24 * 1024, kL2Bytes = 256 * 1024, kLeast = 64, kMost = 128;
  const int64_t fitting = kL1Bytes / max_of(row_bytes, 1);
  return fitting >= kLeast ? min_of(fitting, kMost) : max_of(kLeast, kL2Bytes / row_bytes);
}

/// Fills a pointer table: `rows` rows of `width` elements, from (row, column) of the image on.
template <class X>
void point_at_window(const ChannelImage<X>& image, const X* zeros, int64_t row, int64_t rows, int64_t column,
                     int64_t width, const X** table) {
  const int64_t row_stride = image.size.w * image.channels;
  const int64_t first = min_of(max_of(-column, 0), width), last = max_of(first, min_of(image.size.w - column, width));
  for (int64_t end = row + rows; row < end; ++row, table += width) {
    const bool reads = inside(row, image.size.h);
    const X* source = image.data + row * row_stride + column * image.channels;
    for (int64_t e = 0; e < first; ++e) table[e] = zeros;
    for (int64_t e = first; e < last; ++e) table[e] = reads ? source + e * image.channels : zeros;
    for (int64_t e = last; e < width; ++e) table[e] = zeros;
  }
}

/// Rows that pack_tap_major may write: whole squares.
template <class Acc>
FASTCONV_INLINE int64_t tap_major_rows(int64_t taps) {
  return round_up(taps, simd::kLanes<Acc>);
}

/// Weights (K, R * S) as (R * S, K), so that channels are side by side. Squares are transposed in registers; what they
/// hold of the next channel's taps falls into rows that nobody reads.
template <class T>
void pack_tap_major(const T* weight, int64_t channels, int64_t taps, acc_t<T>* packed) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = tap_major_rows<Acc>(taps), readable = channels - ceil_div(rows - taps, taps);
  parallel_for(0, channels, ceil_div(16384, taps), [&](int64_t begin, int64_t end) {
    int64_t k = begin;
    if constexpr (sizeof(T) == sizeof(Acc)) {
      for (; k + kLane <= min_of(end, readable); k += kLane)
        for (int64_t t = 0; t < rows; t += kLane)
          transpose_square<Acc>(weight + k * taps + t, taps, packed + t * channels + k, channels);
    }
    for (; k < end; ++k)
      for (int64_t t = 0; t < taps; ++t) packed[t * channels + k] = simd::widen(weight[k * taps + t]);
  });
}

/// Rows [begin, end) of an image with every channel repeated `times`: the channel multiplier in front of the lanes.
template <class T>
void repeat_channels(const ChannelImage<T>& image, int64_t begin, int64_t end, int64_t times, acc_t<T>* target) {
  const T* source = image.data + begin * image.size.w * image.channels;
  for (int64_t i = 0; i < (end - begin) * image.size.w * image.channels; ++i)
    for (int64_t j = 0; j < times; ++j) *target++ = simd::widen(source[i]);
}

}  // namespace
}  // namespace fastconv
