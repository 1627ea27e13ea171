// Weights for tiles whose rows are output channels.
//
// In NCHW the forward pass finds rows of weights in memory, in the order of the depth, and reads them in place unless
// there are so many pixels that packing costs nothing, or the rows lie so that they evict each other from L1. An input
// gradient must pack: there K and C have changed places, and with a stride every phase takes some of the taps. Packed,
// the weights of a tile are [depth][kTileRows], one stream through memory.
#pragma once

#include "common/parallel.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/cpu_transpose.h"
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

enum class WeightSource {
  in_place,
  packed_once,      // before the tasks start
  packed_by_strip,  // a tile at a time, into L1, by every task again
};

/// `panels`: of pixels that every weight will meet.
template <class T>
WeightSource weight_source(const GemmConv& p, int64_t panels) {
  // Packing costs a weight two panels' products where it happens in L1, for every strip again; three through memory.
  if (!weights_are_rows<T>(p)) return panels < 24 ? WeightSource::packed_by_strip : WeightSource::packed_once;
  // Reading in place costs about 3 percent, and more where rows are a multiple of 1 KiB apart: six rows then fill most
  // ways of the few cache sets they fall into.
  const bool aliased = p.c * p.tap_count * static_cast<int64_t>(sizeof(acc_t<T>)) % 1024 == 0;
  return panels >= (aliased ? 12 : 48) ? WeightSource::packed_once : WeightSource::in_place;
}

/// Elements of the packed weights of a product.
inline int64_t packed_weight_elems(const GemmConv& p) {
  return p.groups * RowTiles(p.m).tiles * p.c * p.tap_count * kTileRows;
}

#if defined(FASTCONV_SIMD_AVX2)
/// One channel of a tile of an input gradient, where the weights (m, tap) lie together: eight neighbouring taps of
/// eight m are transposed in registers. Stores whole vectors, two elements more than there are rows.
FASTCONV_INLINE void pack_weight_squares(const GemmConv& p, const float* weight, float* target) {
  constexpr int64_t kLane = 8, kLine = 16;
  // The next tile's weights of this channel: every channel is another page, so the hardware does not see them coming.
  for (int64_t i = kLane * p.weight_m_stride; i < (kLane + kTileRows) * p.weight_m_stride; i += kLine)
    __builtin_prefetch(weight + i);
  float square[kLane * kLane];
  for (int64_t t = 0, held = -1; t < p.tap_count; ++t, target += kTileRows) {
    const int64_t offset = p.taps[t].weight_offset_elems, first = offset / kLane * kLane;
    if (p.weight_m_stride == 1) {
      simd::store<float>(target, simd::load(weight + offset));
    } else if (first + kLane > p.weight_m_stride || p.tap_count < kLane) {
      for (int row = 0; row < kTileRows; ++row) target[row] = weight[offset + row * p.weight_m_stride];
    } else {
      if (held != first) transpose_square<float>(weight + first, p.weight_m_stride, square, kLane);
      held = first;
      simd::store<float>(target, simd::load(square + (offset - first) * kLane));
    }
  }
}
#endif

/// The weights of tile `tile` for input channels [c_begin, c_end): [c][tap][kTileRows].
template <class T>
void pack_weight_tile(const GemmConv& p, int64_t group, int64_t tile, int64_t c_begin, int64_t c_end,
                      acc_t<T>* target) {
  const RowTiles tiles(p.m);
  const int64_t m = tiles.begin(tile), rows = tiles.begin(tile + 1) - m;
  const T* weight = static_cast<const T*>(p.weight) + group * p.weight_group_stride + m * p.weight_m_stride +
                    c_begin * p.weight_c_stride;
  int64_t c = c_begin;
#if defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(T) == 4) {
    // The last channel must not store too much.
    if (p.weight_m_stride < p.weight_c_stride && m + 8 <= p.m)
      for (; c + 1 < c_end; ++c, weight += p.weight_c_stride, target += p.tap_count * kTileRows)
        pack_weight_squares(p, weight, target);
  }
#endif
  for (; c < c_end; ++c, weight += p.weight_c_stride)
    for (int64_t t = 0; t < p.tap_count; ++t, target += kTileRows) {
      const T* source = weight + p.taps[t].weight_offset_elems;
      for (int64_t row = 0; row < rows; ++row) target[row] = simd::widen(source[row * p.weight_m_stride]);
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
      for (int64_t i = 0; i < count; ++i)
        pack_weight_tile<T>(products[i], index / tiles, index % tiles, 0, p.c,
                            packed[i] + index * p.c * products[i].tap_count * kTileRows);
  });
}

/// Where the tiles of one product find their weights; `packed` holds those that were packed before the tasks started.
template <class Acc>
struct TileWeights {
  WeightSource source;
  const Acc* packed;

  /// Sets the weights of tile `tile` for input channels [c_begin, c_end); `buffer` holds a tile's.
  template <class T>
  void set(const GemmConv& p, int64_t group, int64_t tile, int64_t c_begin, int64_t c_end, Acc* buffer,
           TileCall<Acc>& call) const {
    const RowTiles tiles(p.m);
    const int64_t depth = p.c * p.tap_count, begin = c_begin * p.tap_count;
    call.a_stride = depth;
    switch (source) {
      case WeightSource::in_place:
        call.a = static_cast<const Acc*>(p.weight) + (group * p.m + tiles.begin(tile)) * depth + begin;
        return;
      case WeightSource::packed_once:
        call.a = packed + ((group * tiles.tiles + tile) * depth + begin) * kTileRows;
        return;
      case WeightSource::packed_by_strip:
        pack_weight_tile<T>(p, group, tile, c_begin, c_end, buffer);
        call.a = buffer;
        return;
    }
    __builtin_unreachable();
  }
  template <Columns kColumnOrder = Columns::panel>
  TileFunction<Acc> tile(int64_t rows, int64_t columns) const {
    return source == WeightSource::in_place ? kTiles<Acc, Rows::depth_contiguous, kColumnOrder>.at(rows, columns)
                                            : kTiles<Acc, Rows::row_contiguous, kColumnOrder>.at(rows, columns);
  }
};

}  // namespace
}  // namespace fastconv
