// Weights for tiles whose rows are output channels.
//
// In NCHW the forward pass finds rows of weights in memory, in the order of the depth, and reads them in place unless
// there are so many pixels that packing costs nothing, or the rows lie so that they evict each other from L1. An input
// gradient must pack: there K and C have changed places, and with a stride every phase takes some of the taps. Packed,
// the weights of a tile are [depth][kTileRows], one stream through memory.
#pragma once

#include "common/parallel.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Rows (group, m, c, t) dense in the accumulator's type: readable in place.
template <class T>
bool weights_are_rows(const GemmConv& p) {
  if (sizeof(T) != sizeof(acc_t<T>)) return false;
  const int64_t depth = p.c * p.tap_count;
  if (p.weight_m_stride != depth || p.weight_c_stride != p.tap_count || p.weight_group_stride != p.m * depth)
    return false;
  for (int64_t t = 0; t < p.tap_count; ++t)
    if (p.taps[t].weight_offset_elems != t) return false;
  return true;
}

/// `panels`: of pixels that every weight will meet.
template <class T>
bool should_pack_weights(const GemmConv& p, int64_t panels) {
  if (!weights_are_rows<T>(p)) return true;
  // Packing costs a weight about as much as one panel's products; reading in place costs those about 3 percent, and
  // more where rows are a multiple of 1 KiB apart: six rows then fill most ways of the few cache sets they fall into.
  const bool aliased = p.c * p.tap_count * static_cast<int64_t>(sizeof(acc_t<T>)) % 1024 == 0;
  return panels >= (aliased ? 12 : 48);
}

/// Elements of the packed weights of a product.
inline int64_t packed_weight_elems(const GemmConv& p) {
  return p.groups * RowTiles(p.m).tiles * p.c * p.tap_count * kTileRows;
}

template <class T>
void pack_weight_tile(const GemmConv& p, int64_t group, int64_t tile, acc_t<T>* packed) {
  const RowTiles tiles(p.m);
  const int64_t m = tiles.begin(tile), rows = tiles.begin(tile + 1) - m;
  const T* weight = static_cast<const T*>(p.weight) + group * p.weight_group_stride + m * p.weight_m_stride;
  acc_t<T>* target = packed + (group * tiles.tiles + tile) * p.c * p.tap_count * kTileRows;
  for (int64_t c = 0; c < p.c; ++c, weight += p.weight_c_stride)
    for (int64_t t = 0; t < p.tap_count; ++t, target += kTileRows) {
      const T* source = weight + p.taps[t].weight_offset_elems;
      if (rows == kTileRows) {
#pragma GCC unroll 16
        for (int row = 0; row < kTileRows; ++row) target[row] = simd::widen(source[row * p.weight_m_stride]);
      } else {
        for (int64_t row = 0; row < rows; ++row) target[row] = simd::widen(source[row * p.weight_m_stride]);
      }
    }
}

/// Packs the weights of products that differ in their taps alone; packed[i] receives those of product i.
template <class T>
void pack_weights(const GemmConv* products, int64_t count, acc_t<T>* const* packed) {
  const GemmConv& p = products[0];
  const int64_t tiles = RowTiles(p.m).tiles;
  int64_t taps = 0;
  for (int64_t i = 0; i < count; ++i) taps += products[i].tap_count;
  parallel_for(0, p.groups * tiles, ceil_div(32768, kTileRows * p.c * taps + 1), [&](int64_t begin, int64_t end) {
    // All phases of a tile together: they share cache lines.
    for (int64_t index = begin; index < end; ++index)
      for (int64_t i = 0; i < count; ++i) pack_weight_tile<T>(products[i], index / tiles, index % tiles, packed[i]);
  });
}

/// Where the tiles of one product find their weights; `packed` is null for weights in place.
template <class Acc>
struct TileWeights {
  const Acc* packed;

  /// Sets the weights of tile `tile` for depth [begin, begin + call.depth).
  void set(const GemmConv& p, int64_t group, int64_t tile, int64_t begin, TileCall<Acc>& call) const {
    const RowTiles tiles(p.m);
    const int64_t depth = p.c * p.tap_count;
    call.a_stride = depth;
    call.a = packed ? packed + ((group * tiles.tiles + tile) * depth + begin) * kTileRows
                    : static_cast<const Acc*>(p.weight) + (group * p.m + tiles.begin(tile)) * depth + begin;
  }
  template <Columns kColumnOrder = Columns::panel>
  TileFunction<Acc> tile(int64_t rows, int64_t columns) const {
    return packed ? kTiles<Acc, Rows::row_contiguous, kColumnOrder>.at(rows, columns)
                  : kTiles<Acc, Rows::depth_contiguous, kColumnOrder>.at(rows, columns);
  }
};

}  // namespace
}  // namespace fastconv
