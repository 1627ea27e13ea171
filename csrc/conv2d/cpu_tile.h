// The register tile: kTileRows x kTileColumns sums kept in registers while the depth runs.
//
//   out[row, column] = (accumulate ? out[row, column] : 0) + sum over d of a[row, d] * b[d, column]
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

/// Where element (row, d) of a lies: a[row * a_stride + d], a[d * a_stride + row], or
/// a[a_row_offsets[row] + a_depth_offsets[d]].
enum class Rows { depth_contiguous, row_contiguous, offsets };

/// Where the columns of step d of b lie, side by side: at b[d * b_stride] or at b[b_offsets[d]].
enum class Columns { strided, offsets };

/// All distances are in elements; nothing needs to be aligned.
template <class Acc>
struct TileCall {
  const Acc* a;
  int64_t a_stride;
  const int64_t* a_row_offsets;
  const int64_t* a_depth_offsets;
  const Acc* b;
  int64_t b_stride;
  const int64_t* b_offsets;
  int64_t depth;
  Acc* out;
  int64_t out_stride;
  bool accumulate;
};

template <class Acc>
using TileFunction = void (*)(const TileCall<Acc>&);

template <class Acc, int kRows, int kVectors, Rows kOrder, Columns kColumnOrder>
__attribute__((noinline)) void multiply_tile(const TileCall<Acc>& call) {
  using V = simd::Vec<Acc>;
  constexpr int kLane = simd::kLanes<Acc>;
  const int64_t a_stride = call.a_stride, b_stride = call.b_stride, depth = call.depth;
  const int64_t* depth_offsets = call.a_depth_offsets;
  const int64_t* b_offsets = call.b_offsets;
  const Acc* b = call.b;
  const Acc* a[kRows];
  V sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    if constexpr (kOrder == Rows::depth_contiguous) a[row] = call.a + row * a_stride;
    if constexpr (kOrder == Rows::row_contiguous) a[row] = call.a + row;
    if constexpr (kOrder == Rows::offsets) a[row] = call.a + call.a_row_offsets[row];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[row][v] = call.accumulate ? simd::load(call.out + row * call.out_stride + v * kLane) : V{};
  }
  int64_t index = 0;
  for (int64_t d = 0; d < depth; ++d) {
    const Acc* step = kColumnOrder == Columns::offsets ? b + b_offsets[d] : b;
    if constexpr (kOrder == Rows::depth_contiguous) index = d;
    if constexpr (kOrder == Rows::offsets) index = depth_offsets[d];
    V columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = simd::load(step + v * kLane);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      // One base pointer for row_contiguous: the rows are constants in the address.
      const V value = simd::broadcast(kOrder == Rows::row_contiguous ? a[0][index + row] : a[row][index]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = simd::fma<Acc>(value, columns[v], sums[row][v]);
    }
    if constexpr (kOrder == Rows::row_contiguous) index += a_stride;
    if constexpr (kColumnOrder == Columns::strided) b += b_stride;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) simd::store<Acc>(call.out + row * call.out_stride + v * kLane, sums[row][v]);
}

/// Tiles for 1..kTileRows rows and 1..kTileVectors vectors: edges do not pay for a full tile.
template <class Acc, Rows kOrder, Columns kColumnOrder>
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
    functions[kRows][kVectors] = &multiply_tile<Acc, kRows, kVectors, kOrder, kColumnOrder>;
    if constexpr (kVectors < kTileVectors) fill_vectors<kRows, kVectors + 1>();
  }
};

template <class Acc, Rows kOrder, Columns kColumnOrder = Columns::strided>
inline constexpr TileTable<Acc, kOrder, kColumnOrder> kTiles{};

/// Rows cut into ceil(count / kTileRows) tiles of nearly equal height: 32 rows as 6+5+5+6+5+5, because a tile of two
/// rows has too few independent sums to hide the latency of an FMA and would run at half speed.
struct RowTiles {
  int64_t count, tiles;
  explicit constexpr RowTiles(int64_t rows) : count(rows), tiles(ceil_div(rows, kTileRows)) {}
  constexpr int64_t begin(int64_t tile) const { return count * tile / tiles; }
};

}  // namespace
}  // namespace fastconv
