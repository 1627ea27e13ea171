// Operands of implicit_gemm_mma's weight gradient: depth runs over pixels, rows of the product are filters, columns the
// weights of a filter in the order of memory: (tap, channel) in NHWC, where each tap is padded to whole chunks of
// channels; (channel, tap) in NCHW. Slices with depth outside are for 16-bit numbers.
#pragma once

#include "conv2d/cuda_implicit_gemm_mma_gather.cuh"

namespace fastconv::cuda {
namespace {

struct WeightGradShape {
  int column_tiles = 1, slices_each = 1;
  int64_t weights = 0;
};

/// A block's tile, and its share of the pixels: whole slices.
struct WeightGradBlock : MmaBlock {
  int first_column = 0;

  /// Blocks along x are (tile of filters, tile of columns), along y shares, along z groups.
  __device__ __forceinline__ WeightGradBlock(const MmaProduct& p, int tile_rows, int tile_columns, int slice,
                                             const WeightGradShape& shape)
      : MmaBlock(forward_axis(p.h), forward_axis(p.w)) {
    first_channel = static_cast<int>(blockIdx.x) / shape.column_tiles * tile_rows;
    first_column = static_cast<int>(blockIdx.x) % shape.column_tiles * tile_columns;
    const int all = (p.pixels + slice - 1) / slice, first = static_cast<int>(blockIdx.y) * shape.slices_each;
    first_pixel = first * slice;
    slices = max(min(shape.slices_each, all - first), 0);
  }
};

/// A slice with depth outside that is copied in chunks: thread t has chunk t % kAcross of depths t / kAcross, ...
template <class T, int kRows_, int kThreads, bool kVector>
struct OutsidePieces {
  static constexpr int kRows = kRows_, kPieces = kRows * 4 / kThreads, kAcross = kRows / kChunk<T>;
  static constexpr bool kDepthOutside = true;

  Piece<T, kVector> piece[kPieces];

  __device__ __forceinline__ static int across() { return static_cast<int>(threadIdx.x) % kAcross; }
  __device__ __forceinline__ static int depth(int i) {
    return static_cast<int>(threadIdx.x) / kAcross + i * (kThreads / kAcross);
  }
  __device__ __forceinline__ static uint32_t place(int i) { return outside_offset<kRows>(depth(i), across()); }
  __device__ __forceinline__ void land(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i].land(slot + place(i));
  }
};

/// Gradients in NHWC: a pixel's filters are neighbours.
template <class T, int kRows, int kThreads, bool kVector>
struct NhwcGradients : OutsidePieces<T, kRows, kThreads, kVector> {
  using Pieces = OutsidePieces<T, kRows, kThreads, kVector>;
  const MmaProduct& p;
  const T *grad, *own;
  int pixel, rest;  // of the first piece; filters from the thread's first on

  __device__ __forceinline__ NhwcGradients(const MmaProduct& product, const WeightGradBlock& block, const T* gradients)
      : p(product), grad(gradients), pixel(block.first_pixel + Pieces::depth(0)) {
    const int filter = block.first_channel + Pieces::across() * kChunk<T>;
    rest = p.channels - filter;
    own = grad + int64_t{block.group} * p.channels + filter;
  }
  __device__ __forceinline__ void load(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < Pieces::kPieces; ++i) {
      const int at = pixel + Pieces::depth(i) - Pieces::depth(0);
      const bool is_there = at < p.pixels && rest > 0;
      this->piece[i].load(slot + Pieces::place(i), is_there ? own + int64_t{at} * p.written.pixel : grad,
                          is_there ? rest : 0);
    }
    pixel += kSlice<T>;
  }
};

/// Images in NHWC: what a pixel's tap sees, chunks of channels.
template <class T, int kRows, int kThreads, bool kVector>
struct NhwcTaps : OutsidePieces<T, kRows, kThreads, kVector> {
  using Pieces = OutsidePieces<T, kRows, kThreads, kVector>;
  const MmaProduct& p;
  const WeightGradBlock& block;
  const T* x;
  int pixel, tap_row, tap_column, channel;

  __device__ __forceinline__ NhwcTaps(const MmaProduct& product, const WeightGradBlock& place, const T* images)
      : p(product), block(place), x(images), pixel(block.first_pixel) {
    const int chunks = (p.depth + kChunk<T> - 1) / kChunk<T>;
    const Digits at(block.first_column / kChunk<T> + Pieces::across(), p.w.taps, chunks);
    tap_row = at.high, tap_column = at.middle, channel = at.low * kChunk<T>;
  }
  __device__ __forceinline__ void load(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < Pieces::kPieces; ++i) {
      const PixelStart<T> start(p, block, x, pixel + Pieces::depth(i));
      const int at = tap_row < p.h.taps ? start.tap(block, tap_row, tap_column) : -1;
      this->piece[i].load(slot + Pieces::place(i), at < 0 ? x : start.image + at * p.read.pixel + channel,
                          at < 0 ? 0 : p.depth - channel);
    }
    pixel += kSlice<T>;
  }
};

/// Planes in NCHW of whole chunks of pixels: rows are channels, depth inside. Of gradients, and of the images of 1x1.
template <class T, int kRows_, int kThreads, bool kGradients>
struct PlaneRows {
  static constexpr int kRows = kRows_, kPieces = kRows * 4 / kThreads;
  static constexpr bool kDepthOutside = false;

  const MmaProduct& p;
  const T *tensor, *own;
  int pixel, rest;  // of channels, from the thread's first on
  Piece<T, true> piece[kPieces];

  __device__ __forceinline__ const MmaTensor& strides() const { return kGradients ? p.written : p.read; }
  __device__ __forceinline__ PlaneRows(const MmaProduct& product, const WeightGradBlock& block, const T* values)
      : p(product), tensor(values), pixel(block.first_pixel + threadIdx.x % 4 * kChunk<T>) {
    const int channels = kGradients ? p.channels : p.depth;
    const int channel = (kGradients ? block.first_channel : block.first_column) + static_cast<int>(threadIdx.x) / 4;
    own = tensor + (int64_t{block.group} * channels + channel) * strides().channel;
    rest = channels - channel;
  }
  __device__ __forceinline__ void load(uint32_t slot) {
    const bool exists = pixel < p.pixels;
    uint32_t in_plane = exists ? static_cast<uint32_t>(pixel) : 0;
    const T* from = own + p.by_plane.divide_keep_rest(in_plane) * strides().image;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      constexpr int kStep = kThreads / 4;
      const bool is_there = exists && i * kStep < rest;
      piece[i].load(slot + row_chunk<kThreads>(i),
                    is_there ? from + int64_t{i * kStep} * strides().channel + in_plane : tensor,
                    is_there ? kChunk<T> : 0);
    }
    pixel += kSlice<T>;
  }
  __device__ __forceinline__ void land(uint32_t) {}
};

/// Where a row (filter) or column (channel, tap) of NCHW lies, relative to a pixel.
template <class T, bool kGradients>
__device__ __forceinline__ GatherEntry plane_entry(const MmaProduct& p, const WeightGradBlock& block, int own) {
  if constexpr (kGradients) {
    const int filter = block.first_channel + own;
    return {filter * p.written.channel, filter < p.channels ? 1 : kNoRow};
  } else {
    return GatherWindow<T>::entry(p, block, Digits(block.first_column + own, p.h.taps, p.w.taps));
  }
}

/// And where a pixel lies: its window in the images, or itself in the gradients.
template <class T, bool kGradients>
struct PlanePixel : GatherWindow<T> {
  using GatherWindow<T>::GatherWindow;
};
template <class T>
struct PlanePixel<T, true> {
  const T* first;
  uint32_t bits;

  __device__ __forceinline__ PlanePixel(const MmaProduct& p, const MmaBlock& block, const T* grad, int pixel)
      : bits(pixel < p.pixels ? 1 : 0) {
    uint32_t in_plane = bits != 0 ? static_cast<uint32_t>(pixel) : 0;
    const T* image = grad + p.by_plane.divide_keep_rest(in_plane) * p.written.image;
    first = image + int64_t{block.group} * p.channels * p.written.channel + in_plane;
  }
};

/// Any planes in NCHW, gathered: a lane has a pixel, a warp some rows (filters) or columns (channel, tap), so loads run
/// along rows of pixels. Depth outside.
template <class T, int kRows_, int kThreads, bool kGradients>
struct GatheredPlanes {
  static constexpr int kRows = kRows_, kEach = kRows * kSlice<T> / kThreads, kChunks = kEach / kChunk<T>;
  static constexpr bool kDepthOutside = true;
  static_assert(kSlice<T> == 32 && kEach <= 32);

  const MmaProduct& p;
  const WeightGradBlock& block;
  const T* tensor;
  int pixel;
  GatherEntry* entries;
  GatheredNumbers<T, kEach> numbers;

  __device__ __forceinline__ GatheredPlanes(const MmaProduct& product, const WeightGradBlock& place, const T* values)
      : p(product), block(place), tensor(values), pixel(block.first_pixel + threadIdx.x % 32) {
    FASTCONV_SHARED(table, GatherEntry[kThreads / 32][kEach]);
    entries = table[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) / 32 * kEach;
    if (lane < kEach) entries[lane] = plane_entry<T, kGradients>(p, block, first + lane);
    __syncwarp();
  }
  __device__ __forceinline__ void load(uint32_t) {
    const PlanePixel<T, kGradients> at(p, block, tensor, pixel);
    numbers.load(entries, at.first, at.bits);
    pixel += kSlice<T>;
  }
  __device__ __forceinline__ void land(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      ptx::st_shared_v4(slot + outside_offset<kRows>(threadIdx.x % 32, threadIdx.x / 32 * kChunks + i),
                        numbers.held.bits[i]);
  }
};

}  // namespace
}  // namespace fastconv::cuda
