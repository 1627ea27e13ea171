// Operands of implicit_gemm_mma's weight gradient in float32. ldmatrix turns no 32-bit numbers, so a slice with depth
// (pixels) inside is turned on its way through registers: a thread has 4 rows (filters, or weights of a filter) of one
// pixel, and stores them apart.
#pragma once

#include "conv2d/cuda_implicit_gemm_mma_weight_operands.cuh"

namespace fastconv::cuda {
namespace {

/// The threads of half a warp have the 16 pixels of a slice.
template <int kRows_, int kThreads>
struct TurnedRows {
  static constexpr int kRows = kRows_, kEach = 4;
  static constexpr bool kDepthOutside = false;
  static_assert(kThreads * kEach == kRows * kSlice<float>);

  GatheredNumbers<float, kEach> numbers;

  __device__ __forceinline__ static int own_pixel() { return static_cast<int>(threadIdx.x) % 16; }
  __device__ __forceinline__ static int own_row() { return static_cast<int>(threadIdx.x) / 16 * kEach; }
  __device__ __forceinline__ void land(uint32_t slot) const {
    FASTCONV_DYNAMIC_SHARED(ring);
    unsigned char* slice = ring + (slot - ptx::shared_address(ring));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t at = inside_offset(own_row() + i, own_pixel() / 4) + static_cast<uint32_t>(own_pixel()) % 4 * 4;
      *reinterpret_cast<float*>(slice + at) = numbers.held.number[i];
    }
  }
};

/// NHWC: 4 neighbours of memory, filters of a gradient or channels of what a tap sees.
template <class T, int kRows, int kThreads, bool kVector, bool kGradients>
struct NhwcFloats : TurnedRows<kRows, kThreads> {
  using Turned = TurnedRows<kRows, kThreads>;
  const MmaProduct& p;
  const WeightGradBlock& block;
  const T* tensor;
  int pixel, rest;                         // numbers from the thread's first on
  int tap_row = 0, tap_column = 0, first;  // of the images

  __device__ __forceinline__ NhwcFloats(const MmaProduct& product, const WeightGradBlock& place, const T* values)
      : p(product), block(place), tensor(values), pixel(block.first_pixel + Turned::own_pixel()) {
    if constexpr (kGradients) {
      first = block.first_channel + Turned::own_row(), rest = p.channels - first;
      first += block.group * p.channels;
    } else {
      const int chunks = (p.depth + kChunk<T> - 1) / kChunk<T>;
      const Digits at((block.first_column + Turned::own_row()) / kChunk<T>, p.w.taps, chunks);
      tap_row = at.high, tap_column = at.middle, first = at.low * kChunk<T>;
      rest = tap_row < p.h.taps ? p.depth - first : 0;
    }
  }
  __device__ __forceinline__ void load(uint32_t) {
    const T* from = tensor;
    int count = pixel < p.pixels ? rest : 0;
    if constexpr (kGradients) {
      if (count > 0) from += int64_t{pixel} * p.written.pixel + first;
    } else {
      const PixelStart<T> start(p, block, tensor, pixel);
      const int at = start.tap(block, tap_row, tap_column);
      if (at < 0) count = 0;
      if (count > 0) from = start.image + at * p.read.pixel + first;
    }
    auto& number = this->numbers.held.number;
    if constexpr (kVector) {
      Vector<float, 4> four = {};
      if (count > 0) four = load_vector<4>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) number[i] = four[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) number[i] = i < count ? from[i] : 0.0f;
    }
    pixel += kSlice<T>;
  }
};

/// NCHW, any planes: lanes have neighbouring pixels, so loads run along rows of pixels.
template <class T, int kRows, int kThreads, bool kGradients>
struct NchwFloats : TurnedRows<kRows, kThreads> {
  using Turned = TurnedRows<kRows, kThreads>;
  const MmaProduct& p;
  const WeightGradBlock& block;
  const T* tensor;
  int pixel;
  GatherEntry* entries;

  __device__ __forceinline__ NchwFloats(const MmaProduct& product, const WeightGradBlock& place, const T* values)
      : p(product), block(place), tensor(values), pixel(block.first_pixel + Turned::own_pixel()) {
    FASTCONV_SHARED(table, GatherEntry[kThreads / 16][Turned::kEach]);
    entries = table[threadIdx.x / 16];
    const int lane = Turned::own_pixel();
    if (lane < Turned::kEach) entries[lane] = plane_entry<T, kGradients>(p, block, Turned::own_row() + lane);
    __syncwarp();
  }
  __device__ __forceinline__ void load(uint32_t) {
    const PlanePixel<T, kGradients> at(p, block, tensor, pixel);
    this->numbers.load(entries, at.first, at.bits);
    pixel += kSlice<T>;
  }
};

}  // namespace
}  // namespace fastconv::cuda
