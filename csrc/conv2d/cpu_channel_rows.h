// Direct convolution on padded rows with output channels in lanes, for NHWC maps of few channels: no im2col.
//
// A task owns a strip of output rows. The input rows it needs are copied once, with their padding; neighbouring outputs
// then read the same distance apart, and every (tap, channel) is a fixed distance from the first, in a table. im2col
// would copy R * S pieces of a few elements for each pixel: as much work as their products.
#pragma once

#include "conv2d/cpu_channel_lanes.h"
#include "conv2d/cpu_padded_rows.h"

namespace fastconv {
namespace {

struct ChannelRowsPlan {
  int64_t first_row, first_column, row_span;
  int64_t pitch;  // elements of a copied row
  int64_t strip_rows, strips_per_image;

  ChannelRowsPlan(const GemmConv& p, int64_t element_bytes) {
    constexpr int64_t kCopyBytes = 64 * 1024;
    const PaddedRows taps(p, 1);
    first_row = taps.first_row, first_column = taps.first_column, row_span = taps.last_row - taps.first_row;
    pitch = ((p.j - 1) * p.step.w + taps.last_column - taps.first_column + 1) * p.c;
    const int64_t fitting = max_of(1, (kCopyBytes / (pitch * element_bytes) - row_span) / p.step.h);
    const int64_t wanted = ceil_div(4 * thread_count(), p.n);
    // A strip of few rows copies little but halo.
    const int64_t most = max_of(1, p.i * p.step.h / (2 * row_span + p.step.h));
    strips_per_image = min_of(p.i, max_of(ceil_div(p.i, fitting), min_of(wanted, most)));
    strip_rows = ceil_div(p.i, strips_per_image);
    strips_per_image = ceil_div(p.i, strip_rows);
  }
  /// Input rows under `rows` output rows.
  int64_t copied_rows(const GemmConv& p, int64_t rows) const { return (rows - 1) * p.step.h + row_span + 1; }
};

/// Few channels, so that im2col is dear beside the products; rows that fill a tile; taps that lie together.
inline bool channel_rows_serve(const GemmConv& p) {
  constexpr int64_t kChannels = 16, kDepth = 640, kHalo = 16;
  if (p.groups != 1 || p.c == 0 || p.c > kChannels || p.tap_count < 2 || p.c * p.tap_count > kDepth) return false;
  if (p.x_strides.c != 1 || p.x_strides.w != p.c || p.j < kTileRows / 2) return false;
  // A task is whole rows: long ones would be too large a copy, and a single one no work for other threads.
  if (p.j > 4096) return false;
  const PaddedRows taps(p, 1);
  return taps.last_row - taps.first_row <= kHalo && taps.last_column - taps.first_column <= kHalo;
}

template <class Acc>
struct ChannelRowsScratch {
  Acc* copy;
  Acc* sums;
  const int64_t* row_offsets;
  const int64_t* depth_offsets;
};

/// One output row, whose first output reads from `source` on.
template <class T>
void convolve_channel_row(const GemmConv& p, const acc_t<T>* weight_panels, const acc_t<T>* source, int64_t y_offset,
                          const ChannelRowsScratch<acc_t<T>>& scratch) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kLane = simd::kLanes<Acc>;
  const RowTiles heights(p.j);
  const bool plain = p.epilogue.is_plain();
  TileCall<Acc> call{};
  call.depth = p.c * p.tap_count;
  call.a_row_offsets = scratch.row_offsets;
  call.a_depth_offsets = scratch.depth_offsets;
  for (int64_t m = 0; m < p.m; m += kColumns) {
    const int64_t columns = min_of(kColumns, p.m - m);
    const bool direct = sizeof(T) == sizeof(Acc) && columns % kLane == 0;
    call.b = weight_panels + m * call.depth;
    call.out_stride = direct ? p.y_strides.w : kColumns;
    for (int64_t tile = 0; tile < heights.tiles; ++tile) {
      const int64_t j = heights.begin(tile), rows = heights.begin(tile + 1) - j;
      int64_t y_offsets[kTileRows];
      for (int64_t row = 0; row < rows; ++row) y_offsets[row] = y_offset + (j + row) * p.y_strides.w;
      call.a = source + j * p.step.w * p.c;
      call.out = direct ? static_cast<Acc*>(p.y) + y_offsets[0] + m : scratch.sums;
      if (direct && !plain && finish_in_tile<T>(p, y_offsets[0], m, call.finish)) {
        kFinishingTiles<Acc, Rows::offsets>.at(rows, columns)(call);
        continue;
      }
      kTiles<Acc, Rows::offsets>.at(rows, columns)(call);
      if (!direct || !plain) store_channel_tile<T>(p, y_offsets, call.out, call.out_stride, m, rows, columns);
    }
  }
}

/// `kept`: what pack_weight_panels made of the weight, or null.
template <class T>
void convolve_channel_rows(const GemmConv& p, const acc_t<T>* kept) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kBytes = sizeof(Acc), kOffsetBytes = sizeof(int64_t);
  const ChannelRowsPlan plan(p, kBytes);
  const int64_t depth = p.c * p.tap_count;
  Scratch packed(kept ? 0 : weight_panel_elems<Acc>(p) * kBytes);
  if (!kept) pack_weight_panels<T>(p, packed.as<Acc>());
  const Acc* panels = kept ? kept : packed.as<Acc>();
  Scratch offsets((depth + kTileRows) * kOffsetBytes);
  int64_t* row_offsets = offsets.as<int64_t>();
  int64_t* depth_offsets = row_offsets + kTileRows;
  for (int64_t row = 0; row < kTileRows; ++row) row_offsets[row] = row * p.step.w * p.c;
  for (int64_t d = 0; d < depth; ++d) {
    const Tap& tap = p.taps[d / p.c];
    depth_offsets[d] = (tap.dh - plan.first_row) * plan.pitch + (tap.dw - plan.first_column) * p.c + d % p.c;
  }

  parallel_for(0, p.n * plan.strips_per_image, 1, [&](int64_t begin, int64_t end) {
    Scratch copy(plan.copied_rows(p, plan.strip_rows) * plan.pitch * kBytes);
    Scratch sums(kTileRows * kColumns * kBytes);
    const ChannelRowsScratch<Acc> scratch{copy.as<Acc>(), sums.as<Acc>(), row_offsets, depth_offsets};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / plan.strips_per_image, first = task % plan.strips_per_image * plan.strip_rows;
      const int64_t count = min_of(plan.strip_rows, p.i - first);
      const T* image = static_cast<const T*>(p.x) + n * p.x_strides.n;
      for (int64_t a = 0; a < plan.copied_rows(p, count); ++a) {
        const int64_t row = first * p.step.h + plan.first_row + a;
        // A width of zero: all padding.
        copy_phase_row<T>(image + row * p.x_strides.h, inside(row, p.h) ? p.w * p.c : 0, plan.first_column * p.c, 1,
                          plan.pitch, scratch.copy + a * plan.pitch);
      }
      for (int64_t i = 0; i < count; ++i)
        convolve_channel_row<T>(p, panels, scratch.copy + i * p.step.h * plan.pitch,
                                p.y_offset + n * p.y_strides.n + (first + i) * p.y_strides.h, scratch);
    }
  });
}

}  // namespace
}  // namespace fastconv
