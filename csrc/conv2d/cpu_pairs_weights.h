// Weights of pairs for tiles whose rows are output channels: the twin of cpu_weight_tiles.h. A forward pass reads them
// in place if that pays and the depth is whole pairs; else a tile is [pair of the depth][kTileRows].
#pragma once

#include "common/parallel.h"
#include "conv2d/cpu_pairs.h"

namespace fastconv {
namespace {

/// Rows of weights whose whole depth (c, t) lies side by side.
inline bool pair_weights_are_rows(const GemmConv& p) {
  if (p.weight_c_stride != p.tap_count) return false;
  for (int64_t t = 0; t < p.tap_count; ++t)
    if (p.taps[t].weight_offset_elems != t) return false;
  return true;
}

/// `panels`: of pixels that every weight will meet.
inline bool pair_weights_in_place(const GemmConv& p, int64_t panels) {
  const int64_t depth = p.c * p.tap_count;
  if (depth % 2 != 0 || !pair_weights_are_rows(p) || p.weight_m_stride != depth) return false;
  // As weight_source(): twelve rows a multiple of 1 KiB apart share the ways of a few cache sets.
  return panels < (depth * kNumberBytes % 1024 == 0 ? 12 : 48);
}

/// Pairs of a packed tile; whole vectors are written, beyond its end too.
inline int64_t packed_tile_pairs(const GemmConv& p) { return ceil_div(p.c * p.tap_count, 2) * kTileRows + 4; }

/// Numbers [begin, end) of the depth of one row of an input gradient, whose channels are apart.
inline void copy_weight_row(const GemmConv& p, const BFloat16* row, int64_t begin, int64_t end, bool whole_taps,
                            BFloat16* target) {
  for (int64_t d = begin; d < end;) {
    const int64_t c = d / p.tap_count, t = d % p.tap_count, length = min_of(p.tap_count - t, end - d);
    const BFloat16* source = row + c * p.weight_c_stride;
    if (whole_taps)
      for (int64_t i = 0; i < length; i += kNumbers)
        _mm512_storeu_si512(target + i,
                            load_numbers(source + p.taps[t].weight_offset_elems + i, lanes_between(0, length - i)));
    else
      for (int64_t i = 0; i < length; ++i) target[i] = source[p.taps[t + i].weight_offset_elems];
    target += length;
    d += length;
  }
}

inline void pack_pair_tile(const GemmConv& p, int64_t group, int64_t tile, Pair* target) {
  constexpr int64_t kChunk = 512;
  const RowTiles tiles(p.m);
  const int64_t m = tiles.begin(tile), rows = tiles.begin(tile + 1) - m, depth = p.c * p.tap_count;
  const BFloat16* weight =
      static_cast<const BFloat16*>(p.weight) + group * p.weight_group_stride + m * p.weight_m_stride;
  if (pair_weights_are_rows(p)) {
    for (int64_t d = 0; d < depth; d += kNumbers)
      transpose_pairs(weight + d, p.weight_m_stride, rows, min_of(kNumbers, depth - d), target + d / 2 * kTileRows,
                      kTileRows);
    return;
  }
  if (p.weight_m_stride == 1) {  // 1x1: a tile's channels side by side
    const __mmask32 mask = lanes_between(0, rows);
    for (int64_t d = 0; d < depth; d += 2, target += kTileRows) {
      const auto load = [&](int64_t c) {
        return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(load_numbers(weight + c * p.weight_c_stride, mask)));
      };
      const __m512i second = d + 1 < depth ? load(d + 1) : _mm512_setzero_si512();
      _mm512_storeu_si512(target, _mm512_or_si512(load(d), _mm512_slli_epi32(second, 16)));
    }
    return;
  }
  bool whole_taps = true;
  for (int64_t t = 1; t < p.tap_count; ++t)
    whole_taps = whole_taps && p.taps[t].weight_offset_elems == p.taps[0].weight_offset_elems + t;
  BFloat16 numbers[kTileRows][kChunk + kNumbers];
  for (int64_t begin = 0; begin < depth; begin += kChunk) {
    const int64_t end = min_of(depth, begin + kChunk);
    for (int64_t row = 0; row < rows; ++row)
      copy_weight_row(p, weight + row * p.weight_m_stride, begin, end, whole_taps, numbers[row]);
    for (int64_t d = begin; d < end; d += kNumbers)
      transpose_pairs(numbers[0] + d - begin, kChunk + kNumbers, rows, min_of(kNumbers, end - d),
                      target + d / 2 * kTileRows, kTileRows);
  }
}

/// Tiles [group][tile], packed_tile_pairs() apart.
inline void pack_pair_tiles(const GemmConv& p, Pair* packed) {
  const int64_t tiles = RowTiles(p.m).tiles, pairs = packed_tile_pairs(p);
  parallel_for(0, p.groups * tiles, ceil_div(65536, 2 * pairs), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      pack_pair_tile(p, index / tiles, index % tiles, packed + index * pairs);
  });
}

}  // namespace
}  // namespace fastconv
