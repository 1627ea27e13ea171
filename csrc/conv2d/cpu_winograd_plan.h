// How Winograd's work is cut: tiles of outputs, blocks of tiles, and the form of the transformed filters.
#pragma once

#include "common/parallel.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Where a tile lies: its image, and its place in the grid of tiles.
struct TilePlace {
  int64_t image, row, column;
};

/// Neighbouring tiles of one row of tiles, in a block.
struct TileRun {
  int64_t lane, count;
  TilePlace first;
};

struct WinogradPlan {
  int64_t outputs, products;         // rows and columns of a tile; numbers of a transformed one
  int64_t rows, columns, tiles;      // tiles of a plane, of all planes
  int64_t block_tiles, blocks;       // tiles of a task
  int64_t parts, channels_per_part;  // of the output channels, where there are few blocks
  int64_t pitch;                     // of a row of input channels
  int64_t filter_step, v_step;       // from one product to the next
  int64_t first_h, first_w;          // input position of the first tap, relative to the output's

  WinogradPlan(const GemmConv& p, int64_t tile_outputs)
      : outputs(tile_outputs), products((tile_outputs + 2) * (tile_outputs + 2)) {
    constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>;
    rows = ceil_div(p.i, outputs), columns = ceil_div(p.j, outputs);
    tiles = p.n * rows * columns;
    // Every block reads all filters; V takes 4 * products bytes a tile and channel, and shares L2 with M and them.
    blocks = ceil_div(tiles, outputs == 4 ? 12 : 24);
    block_tiles = ceil_div(tiles, blocks);
    const int64_t steps = ceil_div(p.m, kColumns), threads = thread_count();
    // Every part transforms the inputs again.
    parts = blocks < 4 * threads && blocks % threads != 0 ? min_of(steps, threads) : 1;
    channels_per_part = ceil_div(steps, parts) * kColumns;
    parts = ceil_div(p.m, channels_per_part);
    // Whole vectors; not a multiple of 1 KiB, or the rows of a register tile would evict each other from L1.
    pitch = round_up(p.c, kLane) + kLane;
    // Transforms write all products' places at once; these must not share the few ways of a cache set.
    filter_step = p.c * kColumns + kLane;
    v_step = block_tiles * pitch + kLane;
    first_h = p.tap_count ? p.taps[0].dh : 0, first_w = p.tap_count ? p.taps[0].dw : 0;
    for (int64_t t = 1; t < p.tap_count; ++t)
      first_h = min_of(first_h, p.taps[t].dh), first_w = min_of(first_w, p.taps[t].dw);
  }

  /// Elements of the transformed filters, and one more: their largest magnitude before the transform.
  int64_t filter_elems(const GemmConv& p) const {
    return products * ceil_div(p.m, kTileColumns<float>) * filter_step + 1;
  }

  TilePlace place(int64_t tile) const { return {tile / columns / rows, tile / columns % rows, tile % columns}; }

  /// Calls body(run) for the runs of tiles [first, first + count).
  template <class Body>
  FASTCONV_INLINE void for_runs(int64_t first, int64_t count, const Body& body) const {
    for (int64_t lane = 0; lane < count;) {
      const TilePlace at = place(first + lane);
      const int64_t length = min_of(columns - at.column, count - lane);
      body(TileRun{lane, length, at});
      lane += length;
    }
  }
};

}  // namespace
}  // namespace fastconv
