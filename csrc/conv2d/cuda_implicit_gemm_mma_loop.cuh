// The main loop of implicit_gemm_mma: a block's tile of the product, slice of depth by slice, on tensor cores.
//
// A slice is 32 numbers deep (of 16 bits; 64 bytes in any type). Slices wait in a ring of kStages slots in shared
// memory: while one is multiplied, the next kStages - 1 are on their way (cp.async). An operand's slice lies in one of
// two ways, and ldmatrix reads both without bank conflicts, because 16-byte chunks are exchanged within a row:
//
//   depth inside   a row of 64 bytes for each row (column) of the product; chunk c of row r is at c ^ (r / 2 % 4):
//                  two rows share 128 bytes, so eight rows at one chunk meet all 32 banks
//   depth outside  a row for each of the 32 depths, with the tile's 64 or 128 numbers side by side; chunk c of depth d
//                  is at c ^ (d % 8); ldmatrix.trans turns 8 x 8 blocks on their way into registers
#pragma once

#include "cuda_support/dtype.h"
#include "cuda_support/ptx.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kSliceBytes = 64, kStages = 4;

/// Numbers of depth in a slice, and of 16 bytes.
template <class T>
constexpr int kSlice = kSliceBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

/// How numbers are multiplied: 16-bit ones as they are, exactly.
template <class T>
struct HalfMath {
  using Number = T;
  static constexpr bool kSplits = false;
  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16<T>(d, a, b);
  }
};

/// The nearest number of 10 bits of mantissa (the instruction would cut instead), and what is left of it.
__device__ __forceinline__ uint32_t tf32_of(uint32_t bits) { return ptx::cvt_rna_tf32(__uint_as_float(bits)); }
__device__ __forceinline__ uint32_t tf32_rest(uint32_t bits) {
  return ptx::cvt_rna_tf32(__uint_as_float(bits) - __uint_as_float(tf32_of(bits)));
}

/// float32, rounded to TF32.
struct Tf32Math {
  using Number = float;
  static constexpr bool kSplits = false;
  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t left[4] = {tf32_of(a[0]), tf32_of(a[1]), tf32_of(a[2]), tf32_of(a[3])};
    const uint32_t right[2] = {tf32_of(b[0]), tf32_of(b[1])};
    ptx::mma_m16n8k8_tf32(d, left, right);
  }
};

/// float32 as the sum of two TF32 numbers: three products instead of one. What is left out of a product x y is less
/// than 3 * 2^-22 |x y|: the product of the rests, and the rounding of each rest. An infinite number becomes NaN.
struct SplitTf32Math {
  using Number = float;
  static constexpr bool kSplits = true;
  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t left[4] = {tf32_of(a[0]), tf32_of(a[1]), tf32_of(a[2]), tf32_of(a[3])};
    const uint32_t left_rest[4] = {tf32_rest(a[0]), tf32_rest(a[1]), tf32_rest(a[2]), tf32_rest(a[3])};
    const uint32_t right[2] = {tf32_of(b[0]), tf32_of(b[1])}, right_rest[2] = {tf32_rest(b[0]), tf32_rest(b[1])};
    ptx::mma_m16n8k8_tf32(d, left_rest, right);
    ptx::mma_m16n8k8_tf32(d, left, right_rest);
    ptx::mma_m16n8k8_tf32(d, left, right);
  }
};

/// A block's tile of the product, and how its warps share it. kBlocks should share a multiprocessor's registers.
template <int kRows_, int kColumns_, int kWarpRows_, int kBlocks_>
struct MmaTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kBlocks = kBlocks_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = 32, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kWarpsAcross * (kRows / kWarpRows);
  static constexpr int kSlotBytes = (kRows + kColumns) * kSliceBytes;
  static constexpr int kRingBytes = kStages * kSlotBytes;
  static constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 8;
  using Sums = float[kFragmentRows][kFragmentColumns][4];
};

/// Where slices are copied by cp.async: 88 registers hold sums and fragments.
using Copied128 = MmaTile<128, 128, 64, 2>;
using Copied64 = MmaTile<64, 64, 32, 4>;
/// Where slices pass through registers, numbers on their way need some: parts are smaller, for twice as many warps.
using Held128 = MmaTile<128, 128, 32, 1>;
using Held64 = MmaTile<64, 64, 16, 2>;

/// Where a chunk lies in a slice with depth inside.
__device__ __forceinline__ uint32_t inside_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kSliceBytes + ((chunk ^ (row >> 1 & 3)) << 4));
}

/// Where a chunk of kRows numbers lies in a slice with depth outside.
template <int kRows>
__device__ __forceinline__ uint32_t outside_offset(int depth, int chunk) {
  return static_cast<uint32_t>(depth * kRows * 2 + ((chunk ^ (depth & 7)) << 4));
}

/// Fragments of 16 rows, from `row` on, and one step of depth (32 bytes) of the left operand.
template <class Operand>
__device__ __forceinline__ void load_left(uint32_t (&fragment)[4], uint32_t slot, int row, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (Operand::kDepthOutside) {
    const int depth = step * 16 + lane / 16 * 8 + lane % 8;
    ptx::ldmatrix_x4_trans(fragment, slot + outside_offset<Operand::kRows>(depth, row / 8 + lane / 8 % 2));
  } else {
    ptx::ldmatrix_x4(fragment, slot + inside_offset(row + lane % 16, step * 2 + lane / 16));
  }
}

/// Of the right operand, for two neighbours of 8 columns, from `column` on.
template <class Operand>
__device__ __forceinline__ void load_right(uint32_t (&fragment)[4], uint32_t slot, int column, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (Operand::kDepthOutside) {
    ptx::ldmatrix_x4_trans(fragment,
                           slot + outside_offset<Operand::kRows>(step * 16 + lane % 16, column / 8 + lane / 16));
  } else {
    ptx::ldmatrix_x4(fragment, slot + inside_offset(column + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
  }
}

/// sum += the product of the slices in `slot`, for the warp's part of the tile.
template <class Math, class Tile, class Left, class Right>
__device__ __forceinline__ void multiply_slice(uint32_t slot, typename Tile::Sums& sum) {
  const int warp = threadIdx.x / 32;
  const int row = warp / Tile::kWarpsAcross * Tile::kWarpRows, column = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
#pragma unroll
  for (int step = 0; step < kSliceBytes / 32; ++step) {
    uint32_t left[Tile::kFragmentRows][4], right[Tile::kFragmentColumns / 2][4];
#pragma unroll
    for (int m = 0; m < Tile::kFragmentRows; ++m) load_left<Left>(left[m], slot, row + m * 16, step);
#pragma unroll
    for (int n = 0; n < Tile::kFragmentColumns / 2; ++n)
      load_right<Right>(right[n], slot + Tile::kRows * kSliceBytes, column + n * 16, step);
#pragma unroll
    for (int m = 0; m < Tile::kFragmentRows; ++m)
#pragma unroll
      for (int n = 0; n < Tile::kFragmentColumns; ++n) {
        const uint32_t pair[2] = {right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]};
        Math::product(sum[m][n], left[m], pair);
      }
  }
}

/// sum = the whole product. Each operand's load(slot) starts the copy of its next slice; land(slot) writes what came by
/// way of registers. All threads may use the ring for something else afterwards.
template <class Math, class Tile, class Left, class Right>
__device__ __forceinline__ void multiply(Left& left, Right& right, int slices, uint32_t ring,
                                         typename Tile::Sums& sum) {
  constexpr uint32_t kRight = Tile::kRows * kSliceBytes;
#pragma unroll 1
  for (int slice = 0; slice < kStages - 1; ++slice) {
    if (slice < slices) {
      const uint32_t slot = ring + static_cast<uint32_t>(slice * Tile::kSlotBytes);
      left.load(slot), right.load(slot + kRight);
      left.land(slot), right.land(slot + kRight);
    }
    ptx::cp_async_commit_group();  // also when empty: groups are counted as slices
  }
  uint32_t reading = 0, filling = kStages - 1;
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // everyone's copies of this slice are there, and the slot to be filled is no longer read
    const bool more = slice + kStages - 1 < slices;
    const uint32_t slot = ring + filling * Tile::kSlotBytes;
    if (more) left.load(slot), right.load(slot + kRight);
    ptx::cp_async_commit_group();
    multiply_slice<Math, Tile, Left, Right>(ring + reading * Tile::kSlotBytes, sum);
    if (more) left.land(slot), right.land(slot + kRight);
    reading = reading + 1 == kStages ? 0 : reading + 1;
    filling = filling + 1 == kStages ? 0 : filling + 1;
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
}

}  // namespace
}  // namespace fastconv::cuda
