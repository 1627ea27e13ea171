// The weight gradient of pairs of bfloat16: rows of a tile are output channels, columns 32 input channels of one tap,
// and a pair of the depth is two neighbouring pixels. Both operands are packed for every chunk of pixels: grad_y once
// for all taps of a task, x once for all output channels.
//
// An item is a tap and a panel of input channels; a task has a block of items and one share of the pixels. As in
// cpu_weight_grad.h shares depend on the problem alone and are added in order.
#pragma once

#include "conv2d/cpu_channel_lanes.h"
#include "conv2d/cpu_pairs_pack.h"

namespace fastconv {
namespace {

/// 32 pixels of x or of grad_y, found once for all channels and taps.
struct PairPixels {
  PixelPositions<float> positions;  // for NHWC
  PanelPixels<float> panel;         // for NCHW
};

struct PairWeightGradPlan {
  static constexpr int64_t kPanels = 8;  // of 32 pixels, a chunk
  GemmConv x, grad_y;                    // as inputs: of the convolution, and of 1x1 over its outputs
  int64_t pixels, chunks, panels, items, items_per_block, blocks, shares;

  explicit PairWeightGradPlan(const GemmWeightGrad& p) : x{}, grad_y{} {
    constexpr int64_t kTasks = 16, kFewestItems = 4, kPixelsPerShare = 1024;
    x.n = p.n, x.c = p.c, x.h = p.h, x.w = p.w, x.i = p.i, x.j = p.j, x.step = p.step;
    x.x = p.x, x.x_strides = p.x_strides;
    grad_y.n = p.n, grad_y.c = p.m, grad_y.h = p.i, grad_y.w = p.j, grad_y.i = p.i, grad_y.j = p.j;
    grad_y.x = p.grad_y, grad_y.x_strides = p.grad_y_strides;
    pixels = p.n * p.i * p.j;
    chunks = ceil_div(pixels, kPanels * kNumbers);
    panels = ceil_div(p.c, kPairColumns);
    items = panels * p.tap_count;
    items_per_block = max_of(kFewestItems, ceil_div(items, kTasks));
    blocks = ceil_div(items, items_per_block);
    shares = max_of(1, min_of(min_of(chunks, pixels / kPixelsPerShare), ceil_div(kTasks, p.groups * blocks)));
  }
  int64_t item_sums(const GemmWeightGrad& p) const { return p.m * kPairColumns; }
};

/// Pairs of pixels of `lanes` channels from `channel` on: target[pair * target_stride + lane], 16 pairs. Writes whole
/// vectors in rising order.
inline void pack_pixel_pair_panel(const GemmConv& p, Layout layout, const PairPixels& pixels, const Tap& tap,
                                  int64_t channel, int64_t lanes, const PairSteps& steps, Pair* target,
                                  int64_t target_stride) {
  const BFloat16* x = static_cast<const BFloat16*>(p.x) + channel * p.x_strides.c;
  if (layout == Layout::nchw) {
    BFloat16 numbers[kNumbers * kNumbers];
    PairTapPlan(p, pixels.panel, tap, steps).load_all(x, p.x_strides.c, lanes, numbers, kNumbers);
    for (int64_t lane = 0; lane < lanes; lane += kNumbers / 2)
      transpose_pairs(numbers + lane * kNumbers, kNumbers, min_of(kNumbers / 2, lanes - lane), kNumbers, target + lane,
                      target_stride);
    return;
  }
  const PixelPositions<float>& at = pixels.positions;
  const __mmask32 mask = lanes_between(0, lanes);
  const int64_t shift = tap.dh * p.x_strides.h + tap.dw * p.x_strides.w;
  const auto load = [&](int64_t pixel) {
    const bool reads =
        pixel < at.count && inside(at.row[pixel] + tap.dh, p.h) && inside(at.column[pixel] + tap.dw, p.w);
    return reads ? load_numbers(x + at.x_offset[pixel] + shift, mask) : _mm512_setzero_si512();
  };
  for (int64_t pixel = 0; pixel < kNumbers; pixel += 2, target += target_stride) {
    const __m512i first = load(pixel), second = load(pixel + 1);
    if (target_stride == kPairColumns) {
      store_pairs(target, first, second);
      continue;
    }
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(second));
    _mm512_storeu_si512(target, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

struct PairWeightGradScratch {
  PairPixels *x, *grad_y;  // of the panels of a chunk
  Pair* rows;              // grad_y: [tile][pair][kTileRows]
  Pair* columns;           // x: [pair][kPairColumns]
};

/// Adds one chunk of pixels to the sums of a block of items; the first chunk starts them.
inline void add_pair_chunk(const GemmWeightGrad& p, const PairWeightGradPlan& plan, int64_t group, int64_t block,
                           int64_t chunk, bool first, const PairWeightGradScratch& scratch, float* sums) {
  const int64_t begin = chunk * plan.kPanels * kNumbers;
  const int64_t count = min_of(plan.kPanels, ceil_div(plan.pixels - begin, kNumbers)), pairs = count * kNumbers / 2;
  for (int64_t i = 0; i < count; ++i) {
    scratch.x[i].positions.locate(plan.x, begin + i * kNumbers, plan.pixels);
    scratch.x[i].panel.locate(plan.x, begin + i * kNumbers, plan.pixels);
    scratch.grad_y[i].positions.locate(plan.grad_y, begin + i * kNumbers, plan.pixels);
    scratch.grad_y[i].panel.locate(plan.grad_y, begin + i * kNumbers, plan.pixels);
  }
  const RowTiles tiles(p.m);
  const PairSteps steps(p.step.w * p.x_strides.w), unit(p.grad_y_strides.w);
  for (int64_t tile = 0; tile < tiles.tiles; ++tile)
    for (int64_t i = 0; i < count; ++i)
      pack_pixel_pair_panel(plan.grad_y, p.layout, scratch.grad_y[i], Tap{0, 0, 0}, group * p.m + tiles.begin(tile),
                            tiles.begin(tile + 1) - tiles.begin(tile), unit,
                            scratch.rows + (tile * pairs + i * kNumbers / 2) * kTileRows, kTileRows);
  TileCall<Pair> call{};
  call.b = scratch.columns, call.depth = pairs;
  call.out_stride = kPairColumns, call.accumulate = !first;
  const int64_t item_end = min_of(plan.items, (block + 1) * plan.items_per_block);
  for (int64_t item = block * plan.items_per_block; item < item_end; ++item, sums += plan.item_sums(p)) {
    const int64_t c = item % plan.panels * kPairColumns, lanes = min_of(kPairColumns, p.c - c);
    for (int64_t i = 0; i < count; ++i)
      pack_pixel_pair_panel(plan.x, p.layout, scratch.x[i], p.taps[item / plan.panels], group * p.c + c, lanes, steps,
                            scratch.columns + i * kNumbers / 2 * kPairColumns, kPairColumns);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      call.a = scratch.rows + tile * pairs * kTileRows;
      call.out = sums + tiles.begin(tile) * kPairColumns;
      kTiles<Pair, Rows::row_contiguous>.at(tiles.begin(tile + 1) - tiles.begin(tile), lanes)(call);
    }
  }
}

/// Adds the shares of an item's sums, in order, and writes them as weights.
inline void write_pair_item(const GemmWeightGrad& p, const PairWeightGradPlan& plan, int64_t group, int64_t item,
                            const float* sums, int64_t share_stride) {
  constexpr int64_t kLane = simd::kLanes<float>;
  const int64_t t = item / plan.panels, c = item % plan.panels * kPairColumns, lanes = min_of(kPairColumns, p.c - c);
  const bool nchw = p.layout == Layout::nchw;
  for (int64_t m = 0; m < p.m; ++m, sums += kPairColumns) {
    BFloat16* target = static_cast<BFloat16*>(p.grad_weight) + (group * p.m + m) * p.c * p.tap_count;
    for (int64_t lane = 0; lane < lanes; lane += kLane) {
      const int64_t live = min_of(kLane, lanes - lane);
      auto total = simd::load(sums + lane);
      for (int64_t share = 1; share < plan.shares; ++share) total += simd::load(sums + share * share_stride + lane);
      if (!nchw || p.tap_count == 1) {
        simd::store_first<BFloat16>(target + t * p.c + c + lane, total, live);
        continue;
      }
      BFloat16 numbers[kLane];
      simd::store<BFloat16>(numbers, total);
      for (int64_t i = 0; i < live; ++i) target[(c + lane + i) * p.tap_count + t] = numbers[i];
    }
  }
}

inline void weight_grad_pairs(const GemmWeightGrad& p) {
  const PairWeightGradPlan plan(p);
  const int64_t group_sums = plan.items * plan.item_sums(p), share_sums = p.groups * group_sums;
  Scratch sums(plan.shares * share_sums * kSumBytes);
  parallel_for(0, plan.shares * p.groups * plan.blocks, 1, [&](int64_t task_begin, int64_t task_end) {
    constexpr int64_t kPixelBytes = sizeof(PairPixels);
    Scratch x(plan.kPanels * kPixelBytes), grad_y(plan.kPanels * kPixelBytes);
    const int64_t pairs = plan.kPanels * kNumbers / 2;
    // + 1: whole vectors are written
    Scratch rows((RowTiles(p.m).tiles * pairs + 1) * kTileRows * kPairBytes);
    Scratch columns(pairs * kPairColumns * kPairBytes);
    const PairWeightGradScratch scratch{x.as<PairPixels>(), grad_y.as<PairPixels>(), rows.as<Pair>(),
                                        columns.as<Pair>()};
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t block = task % plan.blocks, group = task / plan.blocks % p.groups;
      const int64_t share = task / plan.blocks / p.groups;
      float* own =
          sums.as<float>() + share * share_sums + group * group_sums + block * plan.items_per_block * plan.item_sums(p);
      const int64_t first = plan.chunks * share / plan.shares, last = plan.chunks * (share + 1) / plan.shares;
      for (int64_t chunk = first; chunk < last; ++chunk)
        add_pair_chunk(p, plan, group, block, chunk, chunk == first, scratch, own);
    }
  });
  parallel_for(0, p.groups * plan.items, ceil_div(16384, plan.item_sums(p)), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      write_pair_item(p, plan, index / plan.items, index % plan.items, sums.as<float>() + index * plan.item_sums(p),
                      share_sums);
  });
}

}  // namespace
}  // namespace fastconv
