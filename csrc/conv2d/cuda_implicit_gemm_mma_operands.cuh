// The operands of implicit_gemm_mma: how a slice of depth of the images, or of the weights, gets into shared memory.
//
// Nothing is ever unfolded in memory: a chunk's address is worked out when it is copied, and what lies outside an image
// or a tensor is copied as zeros. Depth is ordered as memory is: (tap, channel) in NHWC, where a chunk is 8 channels of
// one tap, padded with zeros up to a multiple of 8; (channel, tap) in NCHW.
#pragma once

#include "conv2d/cuda_implicit_gemm_mma_loop.cuh"
#include "conv2d/cuda_implicit_gemm_mma_product.h"

namespace fastconv::cuda {
namespace {

/// What a block computes.
struct MmaBlock {
  MmaAxis h, w;
  int group = 0, share = 0, first_pixel = 0, first_channel = 0;
  int first_slice = 0, slices = 0;  // of depth

  __device__ __forceinline__ MmaBlock(const MmaAxis& axis_h, const MmaAxis& axis_w)
      : h(axis_h), w(axis_w), group(blockIdx.z) {}

  __device__ __forceinline__ MmaBlock(const MmaProduct& p, int tile_pixels, int tile_channels)
      : h(p.axis_h(static_cast<int>(blockIdx.y) / p.shares)),
        w(p.axis_w(static_cast<int>(blockIdx.y) / p.shares)),
        group(blockIdx.z),
        share(static_cast<int>(blockIdx.y) % p.shares) {
    first_pixel = static_cast<int>(blockIdx.x) / p.channel_tiles * tile_pixels;
    first_channel = static_cast<int>(blockIdx.x) % p.channel_tiles * tile_channels;
  }

  /// Of all slices of the phase, those of the block's share.
  __device__ __forceinline__ void share_slices(int all, int shares) {
    const int each = (all + shares - 1) / shares;
    first_slice = min(share * each, all), slices = min(each, all - first_slice);
  }
};

/// A number in digits: an index into three nested loops. Slices follow one another by adding digits, without divisions.
struct Digits {
  int high, middle, low;

  Digits() = default;
  __device__ __forceinline__ Digits(int number, int middles, int lows) {
    low = number % lows, number /= lows;
    middle = number % middles, high = number / middles;
  }
  __device__ __forceinline__ void add(const Digits& by, int middles, int lows) {
    low += by.low, middle += by.middle, high += by.high;
    if (low >= lows) low -= lows, ++middle;
    if (middle >= middles) middle -= middles, ++high;
  }
};

/// 16 bytes on their way into shared memory.
template <class T, bool kVector>
struct Piece;

/// As one aligned copy that passes no register.
template <class T>
struct Piece<T, true> {
  /// `count` is 0 or all; `from` is valid even if it is 0.
  __device__ __forceinline__ void load(uint32_t to, const T* from, int count) {
    ptx::cp_async_cg_16(to, from, count > 0 ? 16 : 0);
  }
  __device__ __forceinline__ void land(uint32_t) {}
};

/// Number by number, zeros from `count` on; held in registers while the slice before is multiplied.
template <class T>
struct Piece<T, false> {
  union Held {
    uint4 bits;
    T number[kChunk<T>];
    __device__ __forceinline__ Held() : bits{0, 0, 0, 0} {}
  } held;

  __device__ __forceinline__ void load(uint32_t, const T* from, int count) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) held.number[i] = i < count ? from[i] : from_float<T>(0.0f);
  }
  __device__ __forceinline__ void land(uint32_t to) { ptx::st_shared_v4(to, held.bits); }
};

constexpr int kOutside = -(1 << 30);  // a coordinate that no tap brings back into an image

/// Where the window of a pixel starts: in which image, at which row and column.
template <class T>
struct PixelStart {
  const T* image;
  int h, w;

  PixelStart() = default;
  __device__ __forceinline__ PixelStart(const MmaProduct& p, const MmaBlock& block, const T* x, int pixel) {
    const bool exists = pixel < p.pixels;
    uint32_t column = exists ? static_cast<uint32_t>(pixel) : 0;
    const uint32_t n = p.by_plane.divide_keep_rest(column), row = p.by_row.divide_keep_rest(column);
    image = x + n * p.read.image + int64_t{block.group} * p.depth * p.read.channel;
    h = exists ? static_cast<int>(row) * block.h.step + block.h.start : kOutside;
    w = static_cast<int>(column) * block.w.step + block.w.start;
  }

  /// The offset of a tap in the image, in pixels; -1 outside.
  __device__ __forceinline__ int tap(const MmaBlock& block, int row, int column) const {
    const int at_h = h + row * block.h.distance, at_w = w + column * block.w.distance;
    const bool is_inside = static_cast<uint32_t>(at_h) < static_cast<uint32_t>(block.h.read_size) &&
                           static_cast<uint32_t>(at_w) < static_cast<uint32_t>(block.w.read_size);
    return is_inside ? at_h * block.w.read_size + at_w : -1;
  }
};

/// Of a slice with depth inside, thread t takes chunk t % 4 of rows t / 4, ...: the i-th one's place.
template <int kThreads>
__device__ __forceinline__ uint32_t row_chunk(int i) {
  return inside_offset(static_cast<int>(threadIdx.x + i * kThreads) / 4, threadIdx.x % 4);
}

/// Images in NHWC: rows are pixels, depth (tap, channel) inside.
template <class T, int kRows_, int kThreads, bool kVector>
struct NhwcPixels {
  static constexpr int kRows = kRows_, kPieces = kRows * 4 / kThreads;
  static constexpr bool kDepthOutside = false;

  const MmaProduct& p;
  const MmaBlock& block;
  const T* x;
  int chunks;  // of a tap
  Digits at, step;
  PixelStart<T> start[kPieces];
  Piece<T, kVector> piece[kPieces];

  __device__ __forceinline__ NhwcPixels(const MmaProduct& product, const MmaBlock& place, const T* images)
      : p(product),
        block(place),
        x(images),
        chunks((p.depth + kChunk<T> - 1) / kChunk<T>),
        at(block.first_slice * 4 + static_cast<int>(threadIdx.x) % 4, max(block.w.taps, 1), chunks),
        step(4, max(block.w.taps, 1), chunks) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      start[i] = PixelStart<T>(p, block, x, block.first_pixel + static_cast<int>(threadIdx.x + i * kThreads) / 4);
  }
  __device__ __forceinline__ void load(uint32_t slot) {
    const int channel = at.low * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int pixel = at.high < block.h.taps ? start[i].tap(block, at.high, at.middle) : -1;
      piece[i].load(slot + row_chunk<kThreads>(i), pixel < 0 ? x : start[i].image + pixel * p.read.pixel + channel,
                    pixel < 0 ? 0 : p.depth - channel);
    }
    at.add(step, block.w.taps, chunks);
  }
  __device__ __forceinline__ void land(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i].land(slot + row_chunk<kThreads>(i));
  }
};

/// Weights of the forward pass: rows are filters, depth inside as (tap, channel). In NCHW a filter is one run of
/// (channel, tap), so it has one tap of C * R * S channels.
template <class T, int kRows_, int kThreads, bool kVector, bool kNhwc>
struct FilterRows {
  static constexpr int kRows = kRows_, kPieces = kRows * 4 / kThreads;
  static constexpr bool kDepthOutside = false;

  const MmaProduct& p;
  const T *weight, *row;  // the thread's first; those of its other pieces are kThreads / 4 on
  int filter, taps, channels, chunks;
  Digits at, step;  // middle: the tap; low: the chunk
  Piece<T, kVector> piece[kPieces];

  __device__ __forceinline__ FilterRows(const MmaProduct& product, const MmaBlock& block, const T* weights)
      : p(product),
        weight(weights),
        filter(block.first_channel + static_cast<int>(threadIdx.x) / 4),
        taps(kNhwc ? p.h.taps * p.w.taps : 1),
        channels(kNhwc ? p.depth : p.depth * p.h.taps * p.w.taps),
        chunks((channels + kChunk<T> - 1) / kChunk<T>),
        at(block.first_slice * 4 + static_cast<int>(threadIdx.x) % 4, taps, chunks),
        step(4, taps, chunks) {
    row = weight + block.group * p.weight_group + int64_t{filter} * p.weight_channel;
  }
  __device__ __forceinline__ void load(uint32_t slot) {
    const int channel = at.low * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool is_there = filter + i * (kThreads / 4) < p.channels && at.high == 0;
      const T* from = row + int64_t{i * (kThreads / 4)} * p.weight_channel + at.middle * channels + channel;
      piece[i].load(slot + row_chunk<kThreads>(i), is_there ? from : weight, is_there ? channels - channel : 0);
    }
    at.add(step, taps, chunks);
  }
  __device__ __forceinline__ void land(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i].land(slot + row_chunk<kThreads>(i));
  }
};

/// Weights of an input gradient where input channels are neighbours in memory (NHWC, 1x1): depth (tap, filter) outside.
template <class T, int kRows_, int kThreads, bool kVector>
struct FilterColumns {
  static constexpr int kRows = kRows_, kPieces = kRows * 4 / kThreads, kAcross = kRows / kChunk<T>;
  static constexpr bool kDepthOutside = true;
  static constexpr int kDepths = kThreads / kAcross;  // in one go
  static_assert(kDepths * kPieces == kSlice<T> && kDepths % kChunk<T> == 0);

  const MmaProduct& p;
  const MmaBlock& block;
  const T* weight;
  int chunks, rest;  // of filters of a tap; of channels, from the thread's first on
  Digits step;
  Piece<T, kVector> piece[kPieces];
  Digits at[kPieces];

  __device__ __forceinline__ FilterColumns(const MmaProduct& product, const MmaBlock& place, const T* weights)
      : p(product),
        block(place),
        weight(weights),
        chunks((p.depth + kChunk<T> - 1) / kChunk<T>),
        step(4, max(block.w.taps, 1), chunks) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      at[i] = Digits(block.first_slice * 4 + depth(i) / kChunk<T>, max(block.w.taps, 1), chunks);
    rest = p.channels - block.first_channel - across() * kChunk<T>;
  }
  __device__ __forceinline__ int across() const { return static_cast<int>(threadIdx.x) % kAcross; }
  __device__ __forceinline__ int depth(int i) const { return static_cast<int>(threadIdx.x) / kAcross + i * kDepths; }
  __device__ __forceinline__ void load(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int filter = at[i].low * kChunk<T> + depth(i) % kChunk<T>;
      const bool is_there = at[i].high < block.h.taps && filter < p.depth && rest > 0;
      const int tap = (block.h.first_tap + at[i].high * block.h.tap_step) * p.weight_row +
                      (block.w.first_tap + at[i].middle * block.w.tap_step) * p.weight_column;
      const T* from = weight + block.group * p.weight_group + int64_t{filter} * p.weight_depth + tap +
                      block.first_channel + across() * kChunk<T>;
      piece[i].load(slot + outside_offset<kRows>(depth(i), across()), is_there ? from : weight, is_there ? rest : 0);
      at[i].add(step, block.w.taps, chunks);
    }
  }
  __device__ __forceinline__ void land(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i].land(slot + outside_offset<kRows>(depth(i), across()));
  }
};

/// Images in NCHW of a 1x1 product without stride or padding whose planes are whole chunks: depth (channel) outside,
/// chunks are 8 neighbouring pixels.
template <class T, int kRows_, int kThreads>
struct NchwPlanes {
  static constexpr int kRows = kRows_, kPieces = kRows * 4 / kThreads, kAcross = kRows / kChunk<T>;
  static constexpr bool kDepthOutside = true;
  static constexpr int kDepths = kThreads / kAcross;

  const T *x, *from;
  int64_t plane;
  int channel, channels;  // the thread's first; 0 of them beside the last pixel
  Piece<T, true> piece[kPieces];

  __device__ __forceinline__ NchwPlanes(const MmaProduct& p, const MmaBlock& block, const T* images)
      : x(images),
        plane(p.read.channel),
        channel(block.first_slice * kSlice<T> + static_cast<int>(threadIdx.x) / kAcross),
        channels(p.depth) {
    const int pixel = block.first_pixel + static_cast<int>(threadIdx.x) % kAcross * kChunk<T>;
    if (pixel >= p.pixels) channels = 0;
    uint32_t in_plane = pixel < p.pixels ? static_cast<uint32_t>(pixel) : 0;
    const uint32_t n = p.by_plane.divide_keep_rest(in_plane);
    from = x + n * p.read.image + (int64_t{block.group} * p.depth + channel) * plane + in_plane;
  }
  __device__ __forceinline__ void load(uint32_t slot) {
    const int across = static_cast<int>(threadIdx.x) % kAcross;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool is_there = channel + i * kDepths < channels;
      const uint32_t to = slot + outside_offset<kRows>(static_cast<int>(threadIdx.x) / kAcross + i * kDepths, across);
      piece[i].load(to, is_there ? from + i * kDepths * plane : x, is_there ? kChunk<T> : 0);
    }
    channel += kSlice<T>, from += kSlice<T> * plane;
  }
  __device__ __forceinline__ void land(uint32_t) {}
};

}  // namespace
}  // namespace fastconv::cuda
