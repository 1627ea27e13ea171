// Implicit GEMM of pairs of bfloat16 for NCHW: as cpu_pixel_lanes.h, whose plan and tasks these are, with half as many
// steps of depth and sums that always wait in scratch.
#pragma once

#include "conv2d/cpu_pairs_pack.h"
#include "conv2d/cpu_pairs_weights.h"
#include "conv2d/cpu_pixel_store.h"

namespace fastconv {
namespace {

struct PairPixelsPlan {
  int64_t panels, panels_per_strip, strips;
  int64_t row_tiles, tiles_per_task, channel_tasks;  // of output channels
  int64_t blocks, depth_channels;                    // blocks of depth, whole pairs; input channels in each
  bool weights_in_place;

  explicit PairPixelsPlan(const GemmConv& p) {
    constexpr int64_t kStripBytes = 288 * 1024, kStripPanels = 16, kDepth = 640;
    const int64_t threads = thread_count(), taps = max_of(p.tap_count, 1);
    panels = ceil_div(p.n * p.i * p.j, kPairColumns);
    blocks = max_of(1, ceil_div(p.c, max_of(2, min_of(p.c, kDepth / taps))));
    depth_channels = round_up(ceil_div(p.c, blocks), 2);
    blocks = max_of(1, ceil_div(p.c, max_of(1, depth_channels)));
    const int64_t panel_bytes = max_of(depth_channels * taps, 1) * kPairColumns * kNumberBytes;
    const int64_t fitting = max_of(1, min_of(kStripBytes / panel_bytes, kStripPanels));
    strips = ceil_div(panels, fitting);
    row_tiles = RowTiles(p.m).tiles;
    // Every strip reads all weights once more; every split of the channels packs the strips once more.
    const bool split_channels = strips * p.groups < 2 * threads && p.m > 6 * panels;
    channel_tasks = split_channels ? min_of(row_tiles, ceil_div(threads, min_of(threads, strips * p.groups))) : 1;
    if (!split_channels) strips = min_of(panels, round_up(strips, ceil_div(threads, p.groups)));
    panels_per_strip = ceil_div(panels, strips);
    strips = ceil_div(panels, panels_per_strip);
    tiles_per_task = ceil_div(row_tiles, channel_tasks);
    channel_tasks = ceil_div(row_tiles, tiles_per_task);
    weights_in_place = pair_weights_in_place(p, panels);
  }
  int64_t panel_pairs(const GemmConv& p) const { return ceil_div(depth_channels * p.tap_count, 2) * kPairColumns; }
  int64_t tile_sums() const { return panels_per_strip * kTileRows * kPairColumns; }
};

struct PairPixelsScratch {
  PanelPixels<float>* pixels;
  Pair* strip;
  float* sums;
};

/// Sets the weights of tile `tile` from pair `pair` of the depth on.
inline void set_pair_weights(const GemmConv& p, const PairPixelsPlan& plan, const Pair* packed, int64_t group,
                             int64_t tile, int64_t pair, TileCall<Pair>& call) {
  const RowTiles tiles(p.m);
  if (!plan.weights_in_place) {
    call.a = packed + (group * tiles.tiles + tile) * packed_tile_pairs(p) + pair * kTileRows;
    return;
  }
  call.a_stride = p.weight_m_stride / 2;
  call.a = reinterpret_cast<const Pair*>(static_cast<const BFloat16*>(p.weight) + group * p.weight_group_stride +
                                         tiles.begin(tile) * p.weight_m_stride + 2 * pair);
}

/// One tile of channels over all panels of a packed strip.
inline void convolve_pairs_tile(const GemmConv& p, const PairPixelsPlan& plan, TileCall<Pair> call, int64_t channel,
                                int64_t rows, int64_t panel_count, bool last, const PairPixelsScratch& scratch,
                                float* sums) {
  int64_t row_offsets[kTileRows];
  for (int64_t row = 0; row < kTileRows; ++row) row_offsets[row] = row * p.y_strides.c;
  for (int64_t panel = 0; panel < panel_count; ++panel) {
    const PanelPixels<float>& pixels = scratch.pixels[panel];
    call.b = scratch.strip + panel * plan.panel_pairs(p);
    call.out = sums + (plan.blocks == 1 ? 0 : panel * kTileRows * kPairColumns);
    const bool finishes = last && pixels.y_contiguous && finishes_in_registers(p);
    call.finish = pair_finish(p, channel, channel * p.y_strides.c + pixels.runs[0].y_offset, true,
                              lanes_between(0, pixels.count), row_offsets);
    const auto function = plan.weights_in_place ? &pair_tile<Rows::depth_contiguous> : &pair_tile<Rows::row_contiguous>;
    function(finishes, rows, pixels.count)(call);
    if (!last || finishes) continue;
    if (pixels.y_contiguous) store_run<BFloat16>(p, call.out, pixels.runs[0].y_offset, channel, rows, pixels.count);
    else store_pixel_tile<BFloat16>(p, pixels, call.out, channel, rows);
  }
}

inline void convolve_pairs_panels(const GemmConv& p, const PairPixelsPlan& plan, const Pair* packed, int64_t task,
                                  const PairPixelsScratch& scratch) {
  const int64_t part = task % plan.channel_tasks, strip = task / plan.channel_tasks % plan.strips;
  const int64_t group = task / plan.channel_tasks / plan.strips;
  const int64_t first_panel = strip * plan.panels_per_strip;
  const int64_t panel_count = min_of(plan.panels_per_strip, plan.panels - first_panel);
  const RowTiles tiles(p.m);
  const int64_t tile_begin = part * plan.tiles_per_task;
  const int64_t tile_end = min_of(plan.row_tiles, tile_begin + plan.tiles_per_task);
  const BFloat16* x = static_cast<const BFloat16*>(p.x) + group * p.c * p.x_strides.c;

  for (int64_t panel = 0; panel < panel_count; ++panel)
    scratch.pixels[panel].locate(p, (first_panel + panel) * kPairColumns, p.n * p.i * p.j);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t c_begin = block * plan.depth_channels, c_end = min_of(p.c, c_begin + plan.depth_channels);
    for (int64_t panel = 0; panel < panel_count; ++panel)
      pack_pixel_pairs(p, scratch.pixels[panel], x, c_begin, c_end, scratch.strip + panel * plan.panel_pairs(p));
    TileCall<Pair> call{};
    call.depth = ceil_div((c_end - c_begin) * p.tap_count, 2);
    call.out_stride = kPairColumns;
    call.accumulate = block > 0;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t m = tiles.begin(tile), rows = tiles.begin(tile + 1) - m;
      float* sums = scratch.sums + (plan.blocks == 1 ? 0 : (tile - tile_begin) * plan.tile_sums());
      set_pair_weights(p, plan, packed, group, tile, c_begin * p.tap_count / 2, call);
      convolve_pairs_tile(p, plan, call, group * p.m + m, rows, panel_count, block == plan.blocks - 1, scratch, sums);
    }
  }
}

inline void convolve_pairs_pixels(const GemmConv& product) {
  const GemmConv p = flatten_plane(product);
  const PairPixelsPlan plan(p);
  Scratch packed(plan.weights_in_place ? 0 : p.groups * plan.row_tiles * packed_tile_pairs(p) * kPairBytes);
  if (!plan.weights_in_place) pack_pair_tiles(p, packed.as<Pair>());

  parallel_for(0, p.groups * plan.strips * plan.channel_tasks, 1, [&](int64_t begin, int64_t end) {
    // + 1: store_run reads whole vectors past the end of a row
    const int64_t kept = plan.blocks == 1 ? kTileRows * kPairColumns : plan.tiles_per_task * plan.tile_sums();
    Scratch sums((kept + kPairColumns) * kSumBytes);
    Scratch strip(plan.panels_per_strip * plan.panel_pairs(p) * kPairBytes);
    Scratch pixels(plan.panels_per_strip * static_cast<int64_t>(sizeof(PanelPixels<float>)));
    const PairPixelsScratch scratch{pixels.as<PanelPixels<float>>(), strip.as<Pair>(), sums.as<float>()};
    for (int64_t task = begin; task < end; ++task) convolve_pairs_panels(p, plan, packed.as<Pair>(), task, scratch);
  });
}

}  // namespace
}  // namespace fastconv
