// The register tile: kTileRows x kTileColumns sums kept in registers while the depth runs.
//
//   out[row, column] = init[row, column] + sum over d of a[row, d] * b[d, column]
//
// Every convolution pass ends here. One step of depth loads kTileVectors vectors of b, broadcasts one element of a per
// row and issues rows * vectors fused multiply-adds; with 6 x 2 on AVX2 that is 8 loads for 12 FMAs, so the two FMA
// ports stay busy and the loads fit under them. 12 sums + 2 of b + 1 broadcast fill 15 of the 16 registers.
#pragma once

#include "common/simd/simd.h"

namespace fastconv {
namespace {

#if defined(FASTCONV_SIMD_AVX512)
inline constexpr int kTileRows = 12;  // 24 of 32 registers hold sums
inline constexpr int kTileVectors = 2;
#elif defined(FASTCONV_SIMD_AVX2)
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = 2;
#elif defined(FASTCONV_SIMD_NEON)
inline constexpr int kTileRows = 6;  // 24 of 32 registers hold sums
inline constexpr int kTileVectors = 4;
#else
inline constexpr int kTileRows = 4;  // the baseline of x86-64 has 16 registers of 16 bytes
inline constexpr int kTileVectors = 2;
#endif

template <class Acc>
inline constexpr int kTileColumns = kTileVectors * simd::kLanes<Acc>;

/// How a is stored: element (row, d) at a[row * stride + d], or at a[d * stride + row].
enum class Rows { depth_contiguous, row_contiguous };

/// `b` is a panel of kTileColumns per step of depth, 64-byte aligned; `init` (or null for zeros) and `out` are tiles of
/// kTileColumns per row, aligned likewise, and may be the same.
template <class Acc>
using TileFunction = void (*)(const Acc* a, int64_t a_stride, const Acc* b, int64_t depth, const Acc* init, Acc* out);

template <class Acc, int kRows, int kVectors, Rows kOrder>
__attribute__((noinline)) void multiply_tile(const Acc* a, int64_t a_stride, const Acc* b, int64_t depth,
                                             const Acc* init, Acc* out) {
  using V = simd::Vec<Acc>;
  constexpr int kLane = simd::kLanes<Acc>;
  constexpr int kColumns = kTileColumns<Acc>;
  V sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[row][v] = init ? *reinterpret_cast<const V*>(init + row * kColumns + v * kLane) : V{};
  for (int64_t d = 0; d < depth; ++d) {
    V columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = *reinterpret_cast<const V*>(b + d * kColumns + v * kLane);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Acc element = kOrder == Rows::depth_contiguous ? a[row * a_stride + d] : a[d * a_stride + row];
      const V value = simd::broadcast(element);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = simd::fma<Acc>(value, columns[v], sums[row][v]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(out + row * kColumns + v * kLane) = sums[row][v];
}

/// Tiles for 1..kTileRows rows and 1..kTileVectors vectors: edges do not pay for a full tile.
template <class Acc, Rows kOrder>
struct TileTable {
  TileFunction<Acc> functions[kTileRows + 1][kTileVectors + 1] = {};

  constexpr TileTable() { fill_rows<1>(); }
  TileFunction<Acc> at(int64_t rows, int64_t columns) const {
    return functions[rows][(columns + simd::kLanes<Acc> - 1) / simd::kLanes<Acc>];
  }

 private:
  template <int kRows>
  constexpr void fill_rows() {
    fill_vectors<kRows, 1>();
    if constexpr (kRows < kTileRows) fill_rows<kRows + 1>();
  }
  template <int kRows, int kVectors>
  constexpr void fill_vectors() {
    functions[kRows][kVectors] = &multiply_tile<Acc, kRows, kVectors, kOrder>;
    if constexpr (kVectors < kTileVectors) fill_vectors<kRows, kVectors + 1>();
  }
};

template <class Acc, Rows kOrder>
inline constexpr TileTable<Acc, kOrder> kTiles{};

}  // namespace
}  // namespace fastconv
