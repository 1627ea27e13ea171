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

/// Which numbers of an output channel's window an input gradient takes, for windows of up to a vector.
struct WindowTaps {
  bool fit;
  __mmask32 reads;
  __m512i places;

  explicit WindowTaps(const GemmConv& p) : fit(p.tap_count <= kNumbers), reads(0), places(_mm512_setzero_si512()) {
    for (int64_t t = 0; t < p.tap_count; ++t) fit = fit && p.taps[t].weight_offset_elems < kNumbers;
    if (!fit) return;
    alignas(64) uint16_t place[kNumbers] = {};
    for (int64_t t = 0; t < p.tap_count; ++t) {
      place[t] = static_cast<uint16_t>(p.taps[t].weight_offset_elems);
      reads |= __mmask32{1} << place[t];
    }
    places = _mm512_load_si512(place);
  }
};

/// A tile of an input gradient: of every channel of the depth `rows` windows lie side by side.
inline void pack_gradient_tile(const GemmConv& p, const BFloat16* weight, int64_t rows, Pair* target) {
  constexpr int64_t kChunk = 512;
  const WindowTaps taps(p);
  const int64_t depth = p.c * p.tap_count;
  if (depth == 0) return;  // no tap reaches this phase
  if (!taps.fit) {
    auto* numbers = reinterpret_cast<BFloat16*>(target);
    for (int64_t d = 0; d < round_up(depth, 2); ++d)
      for (int64_t row = 0; row < rows; ++row) {
        const BFloat16* source = weight + d / p.tap_count * p.weight_c_stride + row * p.weight_m_stride;
        numbers[(d / 2 * kTileRows + row) * 2 + d % 2] =
            d < depth ? source[p.taps[d % p.tap_count].weight_offset_elems] : BFloat16{};
      }
    return;
  }
  BFloat16 numbers[kTileRows][kChunk + kNumbers];
  const int64_t channels = kChunk / p.tap_count / 2 * 2;  // whole pairs
  for (int64_t first = 0; first < p.c; first += channels) {
    const int64_t count = min_of(channels, p.c - first), begin = first * p.tap_count, end = begin + count * p.tap_count;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t row = 0; row < rows; ++row) {
        const BFloat16* window = weight + (first + c) * p.weight_c_stride + row * p.weight_m_stride;
        _mm512_storeu_si512(numbers[row] + c * p.tap_count,
                            _mm512_permutexvar_epi16(taps.places, load_numbers(window, taps.reads)));
      }
    for (int64_t d = begin; d < end; d += kNumbers)
      transpose_pairs(numbers[0] + d - begin, kChunk + kNumbers, rows, min_of(kNumbers, end - d),
                      target + d / 2 * kTileRows, kTileRows);
  }
}

inline void pack_pair_tile(const GemmConv& p, int64_t group, int64_t tile, Pair* target) {
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
  pack_gradient_tile(p, weight, rows, target);
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
