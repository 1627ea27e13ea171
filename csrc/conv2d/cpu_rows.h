// Direct convolution on padded rows, for NCHW maps with long rows: no im2col at all.
//
// A task owns a strip of output rows. The input rows it needs are copied once, with their padding, and split by stride
// phase: of a stride-2 problem the even and the odd columns lie apart. Every tap of 16 neighbouring outputs is then 16
// neighbouring elements at a fixed distance, and the register tile reads them where they are, through a table with one
// offset per (channel, tap). The copy touches every input once where im2col touches it R * S / stride^2 times.
//
// Tiles do not cross rows, so the last tile of a row is cut: short rows waste too much (select.h says when).
#pragma once

#include "conv2d/cpu_padded_rows.h"
#include "conv2d/cpu_pixel_lanes.h"
#include "conv2d/cpu_pixel_store.h"
#include "conv2d/cpu_weight_tiles.h"

namespace fastconv {
namespace {

struct RowsPlan {
  PaddedRows rows;
  int64_t strips_per_image, strips;
  int64_t blocks, depth_channels;

  RowsPlan(const GemmConv& p, int64_t tile_columns, int64_t element_bytes) : rows(p, tile_columns) {
    constexpr int64_t kStripBytes = 192 * 1024, kDepth = 288;
    const int64_t threads = thread_count();
    depth_channels = max_of(1, min_of(p.c, kDepth / p.tap_count));
    blocks = ceil_div(p.c, depth_channels);
    depth_channels = ceil_div(p.c, blocks);
    const int64_t row_bytes = depth_channels * rows.phases_h * rows.phases_w * rows.pitch * element_bytes;
    const int64_t fitting = max_of(2, kStripBytes / row_bytes - rows.row_span);
    strips_per_image = ceil_div(p.i, fitting);
    if (strips_per_image * p.n * p.groups < 4 * threads)
      strips_per_image = min_of(p.i, round_up(strips_per_image, ceil_div(threads, p.n * p.groups)));
    rows.strip_rows = ceil_div(p.i, strips_per_image);
    strips_per_image = ceil_div(p.i, rows.strip_rows);
    strips = strips_per_image * p.n;
  }
};

template <class Acc>
struct RowsScratch {
  Acc* rows;
  Acc* sums;  // of cut tiles, for every (tile of channels, output row) when there are several blocks of depth
  const int64_t* offsets;
};

/// One tile of channels over one output row.
template <class T>
void convolve_row(const GemmConv& p, const TileWeights<acc_t<T>>& weights, TileCall<acc_t<T>> call,
                  const acc_t<T>* source, int64_t y_offset, int64_t channel, int64_t tile_rows, bool last,
                  acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kLane = simd::kLanes<Acc>;
  for (int64_t j = 0; j < p.j; j += kColumns) {
    const int64_t count = min_of(kColumns, p.j - j);
    const bool direct = sizeof(T) == sizeof(Acc) && p.y_strides.w == 1 && count % kLane == 0;
    call.b = source + j;
    call.out = direct ? static_cast<Acc*>(p.y) + channel * p.y_strides.c + y_offset + j
                      : sums + j / kColumns * kTileRows * kColumns;
    call.out_stride = direct ? p.y_strides.c : kColumns;
    weights.template tile<Columns::offsets>(tile_rows, count)(call);
    if (!last) continue;
    if (direct) finish_in_place(p, call.out, channel, tile_rows, count);
    else store_run<T>(p, call.out, y_offset + j * p.y_strides.w, channel, tile_rows, count);
  }
}

template <class T>
void convolve_rows_strip(const GemmConv& p, const RowsPlan& plan, const TileWeights<acc_t<T>>& weights, int64_t task,
                         const RowsScratch<acc_t<T>>& scratch) {
  constexpr int64_t kColumns = kTileColumns<acc_t<T>>;
  const int64_t strip = task % plan.strips_per_image, n = task / plan.strips_per_image % p.n;
  const int64_t group = task / plan.strips;
  const int64_t i_begin = strip * plan.rows.strip_rows, i_count = min_of(plan.rows.strip_rows, p.i - i_begin);
  const T* image = static_cast<const T*>(p.x) + n * p.x_strides.n + group * p.c * p.x_strides.c;
  const RowTiles tiles(p.m);
  const int64_t row_sums = ceil_div(p.j, kColumns) * kTileRows * kColumns;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t c_begin = block * plan.depth_channels, c_end = min_of(p.c, c_begin + plan.depth_channels);
    copy_padded_rows<T>(p, plan.rows, image, i_begin, i_count, c_begin, c_end, scratch.rows);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t m = tiles.begin(tile), tile_rows = tiles.begin(tile + 1) - m;
      TileCall<acc_t<T>> call{};
      weights.set(p, group, tile, c_begin * p.tap_count, call);
      call.b_offsets = scratch.offsets;
      call.depth = (c_end - c_begin) * p.tap_count;
      call.accumulate = block > 0;
      for (int64_t i = 0; i < i_count; ++i) {
        const int64_t y_offset = p.y_offset + n * p.y_strides.n + (i_begin + i) * p.y_strides.h;
        acc_t<T>* sums = scratch.sums + (plan.blocks == 1 ? 0 : (tile * i_count + i) * row_sums);
        convolve_row<T>(p, weights, call, scratch.rows + i * plan.rows.pitch, y_offset, group * p.m + m, tile_rows,
                        block == plan.blocks - 1, sums);
      }
    }
  }
}

template <class T>
void convolve_rows(const GemmConv& p) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kBytes = sizeof(Acc);
  if (p.c == 0 || p.tap_count == 0) return convolve_pixel_lanes<T>(&p, 1);
  const RowsPlan plan(p, kColumns, kBytes);
  const bool packs = should_pack_weights<T>(p, p.n * p.i * ceil_div(p.j, kColumns));
  Scratch packed(packs ? packed_weight_elems(p) * kBytes : 0);
  Acc* packed_weights = packs ? packed.as<Acc>() : nullptr;
  if (packs) pack_weights<T>(&p, 1, &packed_weights);
  const TileWeights<Acc> weights{packed_weights};
  const int64_t depth = plan.depth_channels * p.tap_count;
  Scratch offsets(depth * static_cast<int64_t>(sizeof(int64_t)));
  for (int64_t d = 0; d < depth; ++d)
    offsets.as<int64_t>()[d] =
        d / p.tap_count * plan.rows.channel_elems() + plan.rows.tap_offset(p, p.taps[d % p.tap_count]);

  parallel_for(0, p.groups * plan.strips, 1, [&](int64_t begin, int64_t end) {
    const int64_t rows_kept = plan.blocks == 1 ? 1 : RowTiles(p.m).tiles * plan.rows.strip_rows;
    Scratch rows(plan.depth_channels * plan.rows.channel_elems() * kBytes);
    Scratch sums((rows_kept * ceil_div(p.j, kColumns) * kTileRows + 1) * kColumns * kBytes);
    const RowsScratch<Acc> scratch{rows.as<Acc>(), sums.as<Acc>(), offsets.as<int64_t>()};
    for (int64_t task = begin; task < end; ++task) convolve_rows_strip<T>(p, plan, weights, task, scratch);
  });
}

}  // namespace
}  // namespace fastconv
