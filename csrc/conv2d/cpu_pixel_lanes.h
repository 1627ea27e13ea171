// Implicit GEMM with pixels in lanes, for NCHW: rows of a tile are output channels, columns are pixels.
//
// A task owns a strip of panels and a range of channels. The strip is packed once per block of depth and stays in L2
// while all channels pass over it; the six weight rows of a tile stay in L1 while all panels of the strip pass over
// them. Sums go straight to the output (that is also where they wait between blocks of depth) unless a panel is ragged,
// crosses images, or the output is narrower than the sums: then they wait in a tile of their own.
#pragma once

#include "conv2d/cpu_pack.h"
#include "conv2d/cpu_pixel_store.h"
#include "conv2d/cpu_weight_tiles.h"

namespace fastconv {
namespace {

struct PixelLanesPlan {
  int64_t panels, panels_per_strip, strips;
  int64_t row_tiles, tiles_per_task, channel_tasks;  // of output channels
  int64_t blocks, depth_channels;                    // blocks of depth, input channels in each

  PixelLanesPlan(const GemmConv& p, int64_t columns, int64_t element_bytes) {
    constexpr int64_t kStripBytes = 288 * 1024;  // of a 512 KiB L2, beside the weights and outputs that stream by
    constexpr int64_t kStripPanels = 16;
    constexpr int64_t kDepth = 320;  // a panel of 20 KiB and six rows of weights share a 32 KiB L1
    const int64_t threads = thread_count(), taps = max_of(p.tap_count, 1);
    panels = ceil_div(p.n * p.i * p.j, columns);
    depth_channels = max_of(1, min_of(p.c, kDepth / taps));
    blocks = max_of(1, ceil_div(p.c, depth_channels));
    depth_channels = ceil_div(p.c, blocks);
    const int64_t panel_bytes = max_of(depth_channels * taps, 1) * columns * element_bytes;
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
  }
};

/// One convolution of a call, with everything that its tasks share.
template <class Acc>
struct PixelLanesJob {
  GemmConv p;
  PixelLanesPlan plan;
  TileWeights<Acc> weights;
  int64_t first_task;
};

template <class T>
struct PixelLanesScratch {
  PanelPixels<acc_t<T>>* pixels;
  acc_t<T>* strip;
  acc_t<T>* sums;
};

/// One tile of channels over all panels of a packed strip.
template <class T>
void convolve_channel_tile(const PixelLanesJob<acc_t<T>>& job, TileCall<acc_t<T>> call, int64_t channel, int64_t rows,
                           int64_t panel_count, bool last, const PixelLanesScratch<T>& scratch, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const GemmConv& p = job.p;
  for (int64_t panel = 0; panel < panel_count; ++panel) {
    const PanelPixels<Acc>& pixels = scratch.pixels[panel];
    const bool direct = sizeof(T) == sizeof(Acc) && pixels.y_contiguous && pixels.count == kColumns;
    call.b = scratch.strip + panel * call.depth * kColumns;
    if (direct) {
      call.out = static_cast<Acc*>(p.y) + channel * p.y_strides.c + pixels.runs[0].y_offset;
      call.out_stride = p.y_strides.c;
    } else {
      call.out = sums + panel * kTileRows * kColumns;
      call.out_stride = kColumns;
    }
    job.weights.tile(rows, pixels.count)(call);
    if (!last) continue;
    if (direct) finish_in_place(p, call.out, channel, rows, kColumns);
    else store_pixel_tile<T>(p, pixels, call.out, channel, rows);
  }
}

template <class T>
void convolve_strip(const PixelLanesJob<acc_t<T>>& job, int64_t task, const PixelLanesScratch<T>& scratch) {
  using Acc = acc_t<T>;
  const GemmConv& p = job.p;
  const PixelLanesPlan& plan = job.plan;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t part = task % plan.channel_tasks, strip = task / plan.channel_tasks % plan.strips;
  const int64_t group = task / plan.channel_tasks / plan.strips;
  const int64_t first_panel = strip * plan.panels_per_strip;
  const int64_t panel_count = min_of(plan.panels_per_strip, plan.panels - first_panel);
  const RowTiles tiles(p.m);
  const int64_t tile_begin = part * plan.tiles_per_task;
  const int64_t tile_end = min_of(plan.row_tiles, tile_begin + plan.tiles_per_task);
  const T* x = static_cast<const T*>(p.x) + group * p.c * p.x_strides.c;

  for (int64_t panel = 0; panel < panel_count; ++panel)
    scratch.pixels[panel].locate(p, (first_panel + panel) * kColumns, p.n * p.i * p.j);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t c_begin = block * plan.depth_channels, c_end = min_of(p.c, c_begin + plan.depth_channels);
    const int64_t depth = (c_end - c_begin) * p.tap_count;
    for (int64_t panel = 0; panel < panel_count; ++panel)
      pack_pixels<T>(p, scratch.pixels[panel], x, c_begin, c_end, scratch.strip + panel * depth * kColumns);
    TileCall<Acc> call{};
    call.depth = depth;
    call.accumulate = block > 0;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t m = tiles.begin(tile), rows = tiles.begin(tile + 1) - m;
      // With one block of depth a ragged panel's tile is done with at once; else it must survive until the last.
      Acc* sums = scratch.sums + (plan.blocks == 1 ? 0 : (tile - tile_begin) * panel_count * kTileRows * kColumns);
      job.weights.set(p, group, tile, c_begin * p.tap_count, call);
      convolve_channel_tile<T>(job, call, group * p.m + m, rows, panel_count, block == plan.blocks - 1, scratch, sums);
    }
  }
}

/// Scratch for the largest of the jobs.
template <class T>
struct PixelLanesMemory {
  int64_t sums_bytes = 0, strip_bytes = 0, pixels_bytes = 0;

  void include(const GemmConv& p, const PixelLanesPlan& plan) {
    using Acc = acc_t<T>;
    constexpr int64_t kColumns = kTileColumns<Acc>, kBytes = sizeof(Acc);
    const int64_t tiles_kept = plan.blocks == 1 ? 1 : plan.tiles_per_task;
    // + 1: store_run reads whole vectors past the end of a row
    sums_bytes = max_of(sums_bytes, (tiles_kept * plan.panels_per_strip * kTileRows + 1) * kColumns * kBytes);
    strip_bytes = max_of(strip_bytes, plan.panels_per_strip * plan.depth_channels * p.tap_count * kColumns * kBytes);
    pixels_bytes = max_of(pixels_bytes, plan.panels_per_strip * static_cast<int64_t>(sizeof(PanelPixels<Acc>)));
  }
};

/// Products of one call that differ in their taps and output grids alone: one, or the phases of an input gradient.
template <class T>
void convolve_pixel_lanes(const GemmConv* products, int64_t count) {
  using Acc = acc_t<T>;
  Scratch job_memory(count * static_cast<int64_t>(sizeof(PixelLanesJob<Acc>)));
  Scratch packed_memory(count * static_cast<int64_t>(sizeof(Acc*)));
  auto* jobs = job_memory.as<PixelLanesJob<Acc>>();
  Acc** packed = packed_memory.as<Acc*>();
  int64_t packed_elems = 0, tasks = 0;
  const int64_t panels = ceil_div(products[0].n * products[0].i * products[0].j, kTileColumns<Acc>);
  const bool packs = should_pack_weights<T>(products[0], panels);
  for (int64_t i = 0; i < count && packs; ++i) packed_elems += packed_weight_elems(products[i]);
  Scratch weights(packed_elems * static_cast<int64_t>(sizeof(Acc)));
  PixelLanesMemory<T> memory;
  packed_elems = 0;
  for (int64_t i = 0; i < count; ++i) {
    const GemmConv p = flatten_plane(products[i]);
    const PixelLanesPlan plan(p, kTileColumns<Acc>, sizeof(Acc));
    packed[i] = packs ? weights.as<Acc>() + packed_elems : nullptr;
    packed_elems += packs ? packed_weight_elems(p) : 0;
    jobs[i] = {p, plan, {packed[i]}, tasks};
    tasks += p.groups * plan.strips * plan.channel_tasks;
    memory.include(p, plan);
  }
  if (packs) pack_weights<T>(products, count, packed);

  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch sums(memory.sums_bytes), strip(memory.strip_bytes), pixels(memory.pixels_bytes);
    const PixelLanesScratch<T> scratch{pixels.as<PanelPixels<Acc>>(), strip.as<Acc>(), sums.as<Acc>()};
    int64_t job = 0;
    for (int64_t task = begin; task < end; ++task) {
      while (job + 1 < count && task >= jobs[job + 1].first_task) ++job;
      convolve_strip<T>(jobs[job], task - jobs[job].first_task, scratch);
    }
  });
}

}  // namespace
}  // namespace fastconv
