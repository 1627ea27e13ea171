// Operands of implicit_gemm_mma that are gathered number by number: images in NCHW under a window, whose 8 neighbours
// in depth are far apart and whose 8 neighbours along a row start at any address; and the weights of an input gradient.
//
// A thread has one row of the slice (a pixel, a channel) and a part of its depth; neighbouring threads have
// neighbouring rows, so loads of a warp coalesce. Where a depth lies, and which bits a row must have for it to exist,
// is the same for all rows: lanes work it out for a depth each, and tell the others through shared memory. That leaves
// two additions, a test and a load for each number; walking channels and taps in every thread took three times as many
// instructions. Numbers become chunks in registers, which wait there until the slice before has been multiplied.
#pragma once

#include "conv2d/cuda_implicit_gemm_mma_operands.cuh"

namespace fastconv::cuda {
namespace {

/// A number at `offset` from a row's first exists if the row has all of `bits`.
struct alignas(8) GatherEntry {
  int offset;
  uint32_t bits;
};
constexpr uint32_t kNoRow = 1u << 31;  // a bit that no row has

/// The window of a pixel: bit r says that tap row r lies in the image, bit 16 + s the same of tap column s.
template <class T>
struct GatherWindow {
  const T* first;
  uint32_t bits = 0;

  __device__ __forceinline__ GatherWindow(const MmaProduct& p, const MmaBlock& block, const T* x, int pixel) {
    const PixelStart<T> start(p, block, x, pixel);
    first = start.image + (int64_t{start.h} * block.w.read_size + start.w);
#pragma unroll 1
    for (int r = 0; r < block.h.taps; ++r)
      bits |= static_cast<uint32_t>(is_inside(start.h + r * block.h.distance, block.h.read_size)) << r;
#pragma unroll 1
    for (int s = 0; s < block.w.taps; ++s)
      bits |= static_cast<uint32_t>(is_inside(start.w + s * block.w.distance, block.w.read_size)) << (16 + s);
  }
  __device__ __forceinline__ static bool is_inside(int at, int size) {
    return static_cast<uint32_t>(at) < static_cast<uint32_t>(size);
  }

  /// Of depth (channel, tap row, tap column).
  __device__ __forceinline__ static GatherEntry entry(const MmaProduct& p, const MmaBlock& block, const Digits& at) {
    const int tap = at.middle * block.h.distance * block.w.read_size + at.low * block.w.distance;
    return {at.high * p.read.channel + tap, at.high < p.depth ? 1u << at.middle | 0x10000u << at.low : kNoRow};
  }
};

/// Numbers of one row, from the entries of this warp.
template <class T, int kEach>
struct GatheredNumbers {
  union Held {
    uint4 bits[kEach / kChunk<T>];
    T number[kEach];
    __device__ __forceinline__ Held() : bits{} {}
  } held;

  __device__ __forceinline__ void load(const GatherEntry* entries, const T* first, uint32_t bits) {
#pragma unroll
    for (int i = 0; i < kEach; i += 2) {
      union {
        uint4 both;
        GatherEntry each[2];
      } two{*reinterpret_cast<const uint4*>(entries + i)};
#pragma unroll
      for (int e = 0; e < 2; ++e)
        held.number[i + e] =
            (bits & two.each[e].bits) == two.each[e].bits ? first[two.each[e].offset] : from_float<T>(0.0f);
    }
  }
};

/// Depth inside. `Source` has a row's `first` and `bits`, gives entry(digits) of a depth, and says in which order depth
/// runs: (tap row, tap column, channel), padded as in NHWC, or (channel, tap row, tap column).
template <class T, int kRows_, int kThreads, class Source>
struct Gathered {
  static constexpr int kRows = kRows_, kEach = kRows * kSlice<T> / kThreads, kChunks = kEach / kChunk<T>;
  static constexpr bool kDepthOutside = false;
  static_assert(kEach % kChunk<T> == 0 && kRows % 32 == 0 && kEach <= 32);

  Source source;
  int middles, lows;
  Digits at, step;  // of the lane's entry
  GatherEntry* entries;
  GatheredNumbers<T, kEach> numbers;

  __device__ __forceinline__ Gathered(const MmaProduct& p, const MmaBlock& block, const T* from)
      : source(p, block, from, static_cast<int>(threadIdx.x) % kRows),
        middles(max(Source::kTapsFirst ? block.w.taps : block.h.taps, 1)),
        lows(Source::kTapsFirst ? (p.depth + kChunk<T> - 1) / kChunk<T> * kChunk<T> : max(block.w.taps, 1)),
        at(block.first_slice * kSlice<T> + static_cast<int>(threadIdx.x) / kRows * kEach +
               static_cast<int>(threadIdx.x) % kEach,
           middles, lows),
        step(kSlice<T>, middles, lows) {
    FASTCONV_SHARED(table, GatherEntry[kThreads / 32][kEach]);
    entries = table[threadIdx.x / 32];
  }

  __device__ __forceinline__ void load(uint32_t) {
    __syncwarp();  // the entries before have been read
    if (threadIdx.x % 32 < kEach) entries[threadIdx.x % 32] = source.entry(at);
    at.add(step, middles, lows);
    __syncwarp();
    numbers.load(entries, source.first, source.bits);
  }
  __device__ __forceinline__ void land(uint32_t slot) {
    const int row = static_cast<int>(threadIdx.x) % kRows, chunk = static_cast<int>(threadIdx.x) / kRows * kChunks;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) ptx::st_shared_v4(slot + inside_offset(row, chunk + i), numbers.held.bits[i]);
  }
};

template <class T>
struct NchwSource : GatherWindow<T> {
  static constexpr bool kTapsFirst = false;
  const MmaProduct& p;
  const MmaBlock& block;

  __device__ __forceinline__ NchwSource(const MmaProduct& product, const MmaBlock& place, const T* x, int row)
      : GatherWindow<T>(product, place, x, place.first_pixel + row), p(product), block(place) {}
  __device__ __forceinline__ GatherEntry entry(const Digits& at) const { return GatherWindow<T>::entry(p, block, at); }
};

/// A row is a channel of the result.
template <class T, bool kTapsFirst_>
struct FilterSource {
  static constexpr bool kTapsFirst = kTapsFirst_;
  const MmaProduct& p;
  const MmaBlock& block;
  const T* first;
  uint32_t bits;

  __device__ __forceinline__ FilterSource(const MmaProduct& product, const MmaBlock& place, const T* weight, int row)
      : p(product), block(place) {
    const int channel = block.first_channel + row;
    bits = channel < p.channels ? 1 : 0;
    first = weight + block.group * p.weight_group + int64_t{bits != 0 ? channel : 0} * p.weight_channel;
  }
  __device__ __forceinline__ GatherEntry entry(const Digits& at) const {
    const int row = kTapsFirst ? at.high : at.middle, column = kTapsFirst ? at.middle : at.low;
    const int filter = kTapsFirst ? at.low : at.high;
    const int tap = (block.h.first_tap + row * block.h.tap_step) * p.weight_row +
                    (block.w.first_tap + column * block.w.tap_step) * p.weight_column;
    return {filter * p.weight_depth + tap, filter < p.depth && row < block.h.taps ? 1 : kNoRow};
  }
};

template <class T, int kRows, int kThreads>
using NchwPixels = Gathered<T, kRows, kThreads, NchwSource<T>>;
template <class T, int kRows, int kThreads, bool kTapsFirst>
using GatheredFilters = Gathered<T, kRows, kThreads, FilterSource<T, kTapsFirst>>;

}  // namespace
}  // namespace fastconv::cuda
