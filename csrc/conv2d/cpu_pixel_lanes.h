// Implicit GEMM with pixels in lanes, for NCHW: rows of a tile are output channels, columns are pixels.
//
// A task owns a strip of panels and a range of channels. The strip is packed once per block of depth and stays in L2
// while all channels pass over it; weights are read in place, row by row, so nothing of them is copied or cached.
// Packing costs about 4 vector operations per panel row and saves 2 * channels of them, so it pays from about 8
// channels on.
#pragma once

#include "conv2d/cpu_pack.h"

namespace fastconv {
namespace {

/// Applies the epilogue to a tile and writes it: rows are channels, columns the panel's pixels.
template <class T>
void store_pixel_tile(const GemmConv& p, const PanelPixels<acc_t<T>>& pixels, acc_t<T>* tile, int64_t channel,
                      int64_t rows) {
  using Acc = acc_t<T>;
  constexpr int kLane = simd::kLanes<Acc>, kColumns = kTileColumns<Acc>;
  const Epilogue& e = p.epilogue;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t plane = (channel + row) * p.y_strides.c;
    T* y = static_cast<T*>(p.y) + plane;
    const T* residual = e.residual ? static_cast<const T*>(e.residual) + plane : nullptr;
    const Acc scale = e.scale ? static_cast<const Acc*>(e.scale)[channel + row] : Acc(1);
    const Acc shift = e.shift ? static_cast<const Acc*>(e.shift)[channel + row] : Acc(0);
    Acc* values = tile + row * kColumns;
    for (int64_t lane = 0; lane < pixels.count; lane += kLane) {
      const int64_t live = min_of(kLane, pixels.count - lane);
      auto value = simd::load(values + lane);
      if (e.scale) value = value * simd::broadcast(scale);
      if (e.shift) value = value + simd::broadcast(shift);
      if (residual) {
        Acc added[kLane] = {};
        for (int64_t i = 0; i < live; ++i) added[i] = simd::widen(residual[pixels.y_offset[lane + i]]);
        value = value + simd::load(added);
      }
      value = simd::activate<Acc>(value, e.activation);
      if (pixels.y_contiguous && live == kLane) {
        simd::store<T>(y + pixels.y_offset[lane], value);
      } else if (pixels.y_contiguous) {
        simd::store_first<T>(y + pixels.y_offset[lane], value, live);
      } else {
        for (int64_t i = 0; i < live; ++i) y[pixels.y_offset[lane + i]] = simd::narrow<T>(value[i]);
      }
    }
  }
}

struct PixelLanesPlan {
  int64_t panels, panels_per_strip, strips;
  int64_t channels_per_task, channel_tasks;  // output channels
  int64_t depth_channels;                    // input channels per block of depth

  PixelLanesPlan(const GemmConv& p, int64_t columns, int64_t element_bytes) {
    constexpr int64_t kStripBytes = 192 * 1024;  // of a 512 KiB L2, beside the sums and the weights that stream by
    constexpr int64_t kDepth = 320;
    const int64_t threads = thread_count();
    panels = ceil_div(p.n * p.i * p.j, columns);
    depth_channels = min_of(p.c, max_of(1, kDepth / max_of(p.tap_count, 1)));
    const int64_t panel_bytes = max_of(depth_channels * p.tap_count, 1) * columns * element_bytes;
    // Enough strips for every thread to have a few, none larger than its share of L2.
    const int64_t balanced = ceil_div(panels, ceil_div(4 * threads, p.groups));
    panels_per_strip = max_of(1, min_of(min_of(kStripBytes / panel_bytes, 16), max_of(balanced, 3)));
    strips = ceil_div(panels, panels_per_strip);
    channel_tasks = max_of(1, min_of(ceil_div(p.m, 4 * kTileRows), ceil_div(2 * threads, p.groups * strips)));
    if (strips * p.groups >= 2 * threads) channel_tasks = 1;
    channels_per_task = round_up(ceil_div(p.m, channel_tasks), kTileRows);
    channel_tasks = ceil_div(p.m, channels_per_task);
  }
};

template <class T>
void convolve_strip(const GemmConv& p, const PixelLanesPlan& plan, const acc_t<T>* weight_rows, int64_t task,
                    PanelPixels<acc_t<T>>* pixels, acc_t<T>* strip, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t part = task % plan.channel_tasks, strip_index = task / plan.channel_tasks % plan.strips;
  const int64_t group = task / plan.channel_tasks / plan.strips;
  const int64_t first_panel = strip_index * plan.panels_per_strip;
  const int64_t panel_count = min_of(plan.panels_per_strip, plan.panels - first_panel);
  const int64_t m_begin = part * plan.channels_per_task, m_end = min_of(p.m, m_begin + plan.channels_per_task);
  const int64_t depth = p.c * p.tap_count;
  const T* x = static_cast<const T*>(p.x) + group * p.c * p.x_strides.c;
  const auto& tiles = kTiles<Acc, Rows::depth_contiguous>;

  for (int64_t panel = 0; panel < panel_count; ++panel)
    pixels[panel].locate(p, (first_panel + panel) * kColumns, p.n * p.i * p.j);
  const int64_t blocks = max_of(1, ceil_div(p.c, max_of(plan.depth_channels, 1)));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t c_begin = block * plan.depth_channels, c_end = min_of(p.c, c_begin + plan.depth_channels);
    const int64_t block_depth = (c_end - c_begin) * p.tap_count;
    for (int64_t panel = 0; panel < panel_count; ++panel)
      pack_pixels<T>(p, pixels[panel], x, c_begin, c_end, strip + panel * block_depth * kColumns);
    for (int64_t m = m_begin; m < m_end; m += kTileRows) {
      const int64_t rows = min_of(kTileRows, m_end - m);
      const Acc* a = weight_rows + (group * p.m + m) * depth + c_begin * p.tap_count;
      for (int64_t panel = 0; panel < panel_count; ++panel) {
        Acc* tile = blocks == 1 ? sums : sums + ((m - m_begin) * panel_count + panel * kTileRows) * kColumns;
        tiles.at(rows, pixels[panel].count)(a, depth, strip + panel * block_depth * kColumns, block_depth,
                                            block == 0 ? nullptr : tile, tile);
        if (block == blocks - 1) store_pixel_tile<T>(p, pixels[panel], tile, group * p.m + m, rows);
      }
    }
  }
}

template <class T>
void convolve_pixel_lanes(const GemmConv& p) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const PixelLanesPlan plan(p, kColumns, sizeof(Acc));
  const int64_t depth = p.c * p.tap_count;
  const bool in_place = weights_are_rows<T>(p);
  Scratch packed(in_place ? 0 : p.groups * p.m * depth * static_cast<int64_t>(sizeof(Acc)));
  if (!in_place) pack_weight_rows<T>(p, packed.as<Acc>());
  const Acc* weight_rows = in_place ? static_cast<const Acc*>(p.weight) : packed.as<Acc>();

  parallel_for(0, p.groups * plan.strips * plan.channel_tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t strip_elements = plan.panels_per_strip * plan.depth_channels * p.tap_count * kColumns;
    const int64_t sums_elements =
        plan.depth_channels >= p.c ? kTileRows * kColumns : plan.channels_per_task * plan.panels_per_strip * kColumns;
    Scratch strip(strip_elements * static_cast<int64_t>(sizeof(Acc)));
    Scratch sums(sums_elements * static_cast<int64_t>(sizeof(Acc)));
    Scratch pixels(plan.panels_per_strip * static_cast<int64_t>(sizeof(PanelPixels<Acc>)));
    for (int64_t task = begin; task < end; ++task)
      convolve_strip<T>(p, plan, weight_rows, task, pixels.as<PanelPixels<Acc>>(), strip.as<Acc>(), sums.as<Acc>());
  });
}

}  // namespace
}  // namespace fastconv
