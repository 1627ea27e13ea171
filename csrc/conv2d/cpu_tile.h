// The register tile: kTileRows x kTileColumns sums kept in registers while the depth runs.
//
//   out[row, column] = (accumulate ? out[row, column] : 0) + sum over d of a[row, d] * b[d, column]
//
// Every convolution pass ends here. One step of depth loads kTileVectors vectors of b, broadcasts one element of a per
// row and issues rows * vectors fused multiply-adds; with 6 x 2 on AVX2 that is 8 loads for 12 FMAs, so the two FMA
// ports stay busy and the loads fit under them. 12 sums + 2 of b + 1 broadcast fill 15 of the 16 registers.
#pragma once

#include "common/simd/simd.h"
#include "conv2d/gemm_conv.h"

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

/// Where element (row, d) of a lies: a[row * a_stride + d], a[d * kTileRows + row], or
/// a[a_row_offsets[row] + a_depth_offsets[d]].
enum class Rows { depth_contiguous, row_contiguous, offsets };

/// Where the columns of step d of b lie, side by side: at b[d * kTileColumns] or at b[b_offsets[d]].
enum class Columns { panel, offsets };

/// What becomes of the sums while they are in registers: activation(scale * sum + shift + residual). No tanh, which is
/// not for registers. `scale` and `shift`, or null, begin at the tile's first column; so does `residual`, in rows as
/// far apart as those of `out`.
template <class Acc>
struct TileFinish {
  const Acc* scale;
  const Acc* shift;
  const Acc* residual;
  Activation activation;
};

/// All distances are in elements; nothing needs to be aligned.
template <class Element>
struct TileCall {
  const Element* a;
  int64_t a_stride;
  const int64_t* a_row_offsets;
  const int64_t* a_depth_offsets;
  const Element* b;
  const int64_t* b_offsets;
  int64_t depth;
  acc_t<Element>* out;
  int64_t out_stride;
  bool accumulate;
  TileFinish<Element> finish;  // of tiles that finish
};

template <class Element>
using TileFunction = void (*)(const TileCall<Element>&);

/// The elements of a that one step of depth needs. Twelve rows have more addresses than x86 has registers, so each
/// order says which of them are worth one: what the compiler spills on its own goes through the FMA ports (vmovq).
template <class Element, int kRows, Rows kOrder>
struct RowElements;

/// Three rows share a pointer: base, base + stride, base + 2 * stride are all one addressing mode.
template <class Element, int kRows>
struct RowElements<Element, kRows, Rows::depth_contiguous> {
  static constexpr int kShare = 3, kPointers = (kRows + kShare - 1) / kShare;
  const Element* pointers[kPointers];
  int64_t stride;

  FASTCONV_INLINE explicit RowElements(const TileCall<Element>& call) : stride(call.a_stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) {
      pointers[i] = call.a + i * kShare * stride;
      asm("" : "+r"(pointers[i]));  // else gcc sees that they are related and makes one per row again
    }
  }
  FASTCONV_INLINE void seek(int64_t) {}
  FASTCONV_INLINE Element at(int row) const { return pointers[row / kShare][row % kShare * stride]; }
  FASTCONV_INLINE void advance() {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) ++pointers[i];
  }
};

/// One pointer: the rows are constants in the address.
template <class Element, int kRows>
struct RowElements<Element, kRows, Rows::row_contiguous> {
  const Element* pointer;

  FASTCONV_INLINE explicit RowElements(const TileCall<Element>& call) : pointer(call.a) {}
  FASTCONV_INLINE void seek(int64_t) {}
  FASTCONV_INLINE Element at(int row) const { return pointer[row]; }
  FASTCONV_INLINE void advance() { pointer += kTileRows; }
};

/// The first rows have a pointer each; of more than eight the others' offsets are read again at every step.
template <class Element, int kRows>
struct RowElements<Element, kRows, Rows::offsets> {
  static constexpr int kHeld = kRows <= 8 ? kRows : 5;
  const Element* held[kHeld];
  const Element* base;
  const int64_t* depth_offsets;
  const volatile int64_t* row_offsets;  // volatile: not to be held in registers that do not exist
  int64_t index = 0;

  FASTCONV_INLINE explicit RowElements(const TileCall<Element>& call)
      : base(call.a), depth_offsets(call.a_depth_offsets), row_offsets(call.a_row_offsets) {
#pragma GCC unroll 16
    for (int row = 0; row < kHeld; ++row) held[row] = call.a + call.a_row_offsets[row];
  }
  FASTCONV_INLINE void seek(int64_t d) { index = depth_offsets[d]; }
  FASTCONV_INLINE Element at(int row) const {
    if (row < kHeld) return held[row][index];
    return base[index + row_offsets[row]];
  }
  FASTCONV_INLINE void advance() {}
};

/// What is different where elements are not numbers of the sums' type: the products of a step of depth, and how sums
/// finish.
template <class Element>
struct TileStep {
  using Vector = simd::Vec<Element>;
  static constexpr bool kStoresFinished = false;  // they are stored as sums are
  static FASTCONV_INLINE Vector broadcast(Element value) { return simd::broadcast(value); }
  static FASTCONV_INLINE Vector add_product(Vector a, Vector b, Vector sum) { return simd::fma<Element>(a, b, sum); }

  /// The residual comes from as far away as the sums take to be ready.
  template <int kRows, int kVectors>
  static FASTCONV_INLINE void prefetch(const TileCall<Element>& call) {
    if (!call.finish.residual) return;
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        __builtin_prefetch(call.finish.residual + row * call.out_stride + v * simd::kLanes<Element>);
  }

  template <int kRows, int kVectors>
  static FASTCONV_INLINE void finish(const TileCall<Element>& call, Vector (&sums)[kRows][kVectors]) {
    constexpr int kLane = simd::kLanes<Element>;
    const TileFinish<Element>& how = call.finish;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (how.scale) {
        const Vector scale = simd::load(how.scale + v * kLane);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sums[row][v] = sums[row][v] * scale;
      }
      if (how.shift) {
        const Vector shift = simd::load(how.shift + v * kLane);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sums[row][v] = sums[row][v] + shift;
      }
    }
    if (how.residual) {
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sums[row][v] = sums[row][v] + simd::load(how.residual + row * call.out_stride + v * kLane);
    }
    if (how.activation == Activation::none) return;
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = simd::activate<Element>(sums[row][v], Activation::relu);
    if (how.activation != Activation::relu6) return;
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = simd::activate<Element>(sums[row][v], Activation::relu6);
  }
};

template <class Element, int kRows, int kVectors, Rows kOrder, Columns kColumnOrder, bool kFinish>
__attribute__((noinline)) void multiply_tile(const TileCall<Element>& call) {
  using Acc = acc_t<Element>;
  using Step = TileStep<Element>;
  using V = simd::Vec<Acc>;
  constexpr int kLane = simd::kLanes<Acc>;
  const int64_t depth = call.depth;
  const int64_t* b_offsets = call.b_offsets;
  const Element* b = call.b;
  RowElements<Element, kRows, kOrder> a(call);
  if constexpr (kFinish) Step::template prefetch<kRows, kVectors>(call);
  V sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[row][v] = V{};
  for (int64_t d = 0; d < depth; ++d) {
    const Element* step = kColumnOrder == Columns::offsets ? b + b_offsets[d] : b + d * kTileColumns<Element>;
    a.seek(d);
    V columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = simd::load(step + v * kLane);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const V value = Step::broadcast(a.at(row));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = Step::add_product(value, columns[v], sums[row][v]);
    }
    a.advance();
  }
  // What was there comes last, not first, where sums wait in `out`: many short chains round less than one long one.
  if (call.accumulate) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] += simd::load(call.out + row * call.out_stride + v * kLane);
  }
  if constexpr (kFinish) {
    Step::finish(call, sums);
    if constexpr (Step::kStoresFinished) return;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) simd::store<Acc>(call.out + row * call.out_stride + v * kLane, sums[row][v]);
}

/// Tiles for 1..kTileRows rows and 1..kTileVectors vectors: edges do not pay for a full tile.
template <class Element, Rows kOrder, Columns kColumnOrder, bool kFinish>
struct TileTable {
  TileFunction<Element> functions[kTileRows + 1][kTileVectors + 1] = {};

  constexpr TileTable() { fill_rows<1>(); }
  TileFunction<Element> at(int64_t rows, int64_t columns) const {
    return functions[rows][(columns + simd::kLanes<Element> - 1) / simd::kLanes<Element>];
  }

 private:
  template <int kRows>
  constexpr void fill_rows() {
    fill_vectors<kRows, 1>();
    if constexpr (kRows < kTileRows) fill_rows<kRows + 1>();
  }
  template <int kRows, int kVectors>
  constexpr void fill_vectors() {
    functions[kRows][kVectors] = &multiply_tile<Element, kRows, kVectors, kOrder, kColumnOrder, kFinish>;
    if constexpr (kVectors < kTileVectors) fill_vectors<kRows, kVectors + 1>();
  }
};

template <class Element, Rows kOrder, Columns kColumnOrder = Columns::panel>
inline constexpr TileTable<Element, kOrder, kColumnOrder, false> kTiles{};

/// Tiles that finish their sums.
template <class Element, Rows kOrder>
inline constexpr TileTable<Element, kOrder, Columns::panel, true> kFinishingTiles{};

/// Rows cut into ceil(count / kTileRows) tiles of nearly equal height: 32 rows as 6+6+5+5+5+5, because a tile of two
/// rows has too few independent sums to hide the latency of an FMA and would run at half speed.
struct RowTiles {
  int64_t tiles;
  int64_t rows, taller;  // of a tile; the first `taller` tiles have a row more
  explicit constexpr RowTiles(int64_t count)
      : tiles(ceil_div(count, kTileRows)), rows(tiles ? count / tiles : 0), taller(count - rows * tiles) {}
  constexpr int64_t begin(int64_t tile) const { return tile * rows + min_of(tile, taller); }
};

}  // namespace
}  // namespace fastconv
