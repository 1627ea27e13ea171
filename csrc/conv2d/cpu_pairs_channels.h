// Implicit GEMM of pairs of bfloat16 for NHWC: as cpu_channel_lanes.h, whose plan and tasks these are, with rows that
// are copied as they are, half as many steps of depth and sums that always wait in scratch.
#pragma once

#include "conv2d/cpu_pairs_rows.h"

namespace fastconv {
namespace {

struct PairChannelsPlan : ChannelTasks {
  int64_t depth, depth_block;  // numbers; a block is whole pairs

  explicit PairChannelsPlan(const GemmConv& p) : ChannelTasks(p, kPairColumns), depth(p.c * p.tap_count) {
    constexpr int64_t kDepth = 1280;
    depth_block = depth == 0 ? 2 : round_up(ceil_div(depth, ceil_div(depth, kDepth)), 2);
    share(p, fitting(depth_block * kNumberBytes));
  }
  int64_t depth_pairs() const { return ceil_div(depth, 2); }
};

/// Pixels can be read in place if their rows are whole pairs, one block of depth each, evenly spaced.
inline bool pairs_in_place(const GemmConv& p) {
  if (p.c % 2 != 0 || p.tap_count != 1 || p.step.h != 1 || p.step.w != 1) return false;
  return p.taps[0].dh == 0 && p.taps[0].dw == 0 && p.i == p.h && p.j == p.w;
}

struct PairChannelsScratch {
  BFloat16* rows;
  float* sums;
  Pair* weights;  // of a panel and a block of depth
  int64_t* y_offsets;
};

/// Rows of one block of depth for the pixels of a strip, and the distance of one from the next.
struct PairStripRows {
  const BFloat16* rows;
  int64_t stride;
};

inline PairStripRows strip_rows(const GemmConv& p, const PairTaps& taps, int64_t group, int64_t first, int64_t count,
                                int64_t begin, int64_t end, const PairChannelsScratch& scratch) {
  const BFloat16* x = static_cast<const BFloat16*>(p.x) + group * p.c * p.x_strides.c;
  const bool in_place = pairs_in_place(p);
  const int64_t row_numbers = round_up(end - begin, 2);
  PixelPositions<float> pixels;
  for (int64_t pixel = 0; pixel < count && !(in_place && begin > 0); pixel += kPairColumns) {
    pixels.locate(p, first + pixel, first + count);
    for (int64_t i = 0; i < pixels.count; ++i) scratch.y_offsets[pixel + i] = pixels.y_offset[i];
    if (!in_place) gather_pairs(p, taps, pixels, x, begin, end, row_numbers, scratch.rows + pixel * row_numbers);
  }
  if (in_place) return {x + first * p.x_strides.w + begin, p.x_strides.w};
  return {scratch.rows, row_numbers};
}

inline void convolve_pairs_strip(const GemmConv& p, const PairChannelsPlan& plan, const PairTaps& taps,
                                 const Pair* weight_panels, int64_t task, const PairChannelsScratch& scratch) {
  const int64_t part = task % plan.panel_tasks, strip = task / plan.panel_tasks % plan.strips;
  const int64_t group = task / plan.panel_tasks / plan.strips;
  const int64_t first = strip * plan.strip_pixels, count = min_of(plan.strip_pixels, plan.pixels - first);
  const int64_t panel_begin = part * plan.panels_per_task;
  const int64_t panel_end = min_of(plan.panels, panel_begin + plan.panels_per_task);
  const RowTiles heights(count);
  for (int64_t begin = 0; begin == 0 || begin < plan.depth; begin += plan.depth_block) {
    const int64_t end = min_of(plan.depth, begin + plan.depth_block);
    const PairStripRows rows = strip_rows(p, taps, group, first, count, begin, end, scratch);
    TileCall<Pair> call{};
    call.a_stride = rows.stride / 2, call.depth = ceil_div(end - begin, 2);
    call.accumulate = begin > 0;
    call.out_stride = kPairColumns;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t m = panel * kPairColumns, columns = min_of(kPairColumns, p.m - m);
      if (plan.packs_by_task) {
        pack_pair_panel(p, taps, group, panel, begin, end, scratch.weights);
        call.b = scratch.weights;
      } else {
        call.b = weight_panels + ((group * plan.panels + panel) * plan.depth_pairs() + begin / 2) * kPairColumns;
      }
      for (int64_t tile = 0; tile < heights.tiles; ++tile) {
        const int64_t pixel = heights.begin(tile), live = heights.begin(tile + 1) - pixel;
        call.a = reinterpret_cast<const Pair*>(rows.rows + pixel * rows.stride);
        call.out = scratch.sums;
        if (plan.depth_block < plan.depth)
          call.out += ((panel - panel_begin) * plan.strip_pixels + pixel) * kPairColumns;
        const bool last = end == plan.depth, finishes = last && finishes_in_registers(p);
        call.finish = pair_finish(p, group * p.m + m, group * p.m + m, false, lanes_between(0, columns),
                                  scratch.y_offsets + pixel);
        pair_tile<Rows::depth_contiguous>(finishes, live, columns)(call);
        if (last && !finishes)
          store_channel_tile<BFloat16>(p, scratch.y_offsets + pixel, call.out, kPairColumns, group * p.m + m, live,
                                       columns);
      }
    }
  }
}

inline void convolve_pairs_channels(const GemmConv& p) {
  const PairChannelsPlan plan(p);
  const PairTaps taps(p);
  Scratch packed(plan.packs_by_task ? 0 : p.groups * plan.panels * plan.depth_pairs() * kPairColumns * kPairBytes);
  if (!plan.packs_by_task) pack_pair_panels(p, taps, packed.as<Pair>());

  parallel_for(0, p.groups * plan.strips * plan.panel_tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t sums_rows = plan.depth_block >= plan.depth ? kTileRows : plan.panels_per_task * plan.strip_pixels;
    Scratch rows(pairs_in_place(p) ? 0 : (plan.strip_pixels * plan.depth_block + kNumbers) * kNumberBytes);
    Scratch sums(sums_rows * kPairColumns * kSumBytes);
    Scratch weights(plan.packs_by_task ? plan.depth_block / 2 * kPairColumns * kPairBytes : 0);
    Scratch offsets(plan.strip_pixels * static_cast<int64_t>(sizeof(int64_t)));
    const PairChannelsScratch scratch{rows.as<BFloat16>(), sums.as<float>(), weights.as<Pair>(), offsets.as<int64_t>()};
    for (int64_t task = begin; task < end; ++task)
      convolve_pairs_strip(p, plan, taps, packed.as<Pair>(), task, scratch);
  });
}

}  // namespace
}  // namespace fastconv
