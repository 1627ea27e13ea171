// The end of implicit_gemm_mma: sums leave the registers by way of shared memory, 16 rows of a warp at a time, so that
// a lane finishes 16 neighbouring bytes of the result and stores them at once.
//
// Columns of the product are neighbours in memory: channels in NHWC, pixels in NCHW (where the operands change sides).
#pragma once

#include "conv2d/cuda_flat_epilogue.cuh"
#include "conv2d/cuda_implicit_gemm_mma_operands.cuh"

namespace fastconv::cuda {
namespace {

// 4 words more than a row has: two rows of 8 lanes then read different banks.
constexpr int kBufferRow = 36, kBufferWords = 16 * kBufferRow;

/// Scale and shift of the tile's channels.
template <int kChannels>
struct ChannelTable {
  float scale[kChannels], shift[kChannels];

  __device__ __forceinline__ void fill(const CudaEpilogue& epilogue, const MmaProduct& p, const MmaBlock& block) {
    for (int i = threadIdx.x; i < min(kChannels, p.channels - block.first_channel); i += blockDim.x) {
      const int channel = block.group * p.channels + block.first_channel + i;
      scale[i] = epilogue.scale.data != nullptr ? epilogue.scale.at(channel) : 1.0f;
      shift[i] = epilogue.shift.data != nullptr ? epilogue.shift.at(channel) : 0.0f;
    }
  }
};

/// Of sums that are stored as they are.
struct PlainTable {
  struct All {
    float value;
    __device__ __forceinline__ float operator[](int) const { return value; }
  };
  All scale{1}, shift{0};
};

/// Where a pixel of the grid lies in the result, for channel 0 of the group; -1 if it does not exist.
__device__ __forceinline__ int64_t place_of(const MmaProduct& p, const MmaBlock& block, int pixel) {
  if (pixel >= p.pixels) return -1;
  uint32_t column = static_cast<uint32_t>(pixel);
  const uint32_t n = p.by_plane.divide_keep_rest(column), row = p.by_row.divide_keep_rest(column);
  const int h = static_cast<int>(row) * block.h.write_step + block.h.phase;
  const int w = static_cast<int>(column) * block.w.write_step + block.w.phase;
  if (h >= block.h.write_size || w >= block.w.write_size) return -1;
  return n * p.written.image + int64_t{h * block.w.write_size + w} * p.written.pixel +
         int64_t{block.group} * p.channels * p.written.channel;
}

/// The last step of `count` neighbours, which are scaled and shifted.
template <class T>
__device__ __forceinline__ void store_chunk(const FlatEpilogue& end, T* y, int64_t to, float (&value)[kChunk<T>]) {
  if (end.residual != nullptr) {
    const auto residual = load_vector<kChunk<T>>(static_cast<const T*>(end.residual) + to);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) value[i] += to_float(residual[i]);
  }
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) value[i] = end.clamp(value[i]);
  if (end.is_tanh) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) value[i] = tanhf(value[i]);
  }
  store_vector(y + to, from_float<T>(value));
}

/// 16 rows of the warp, 32 columns, as vectors. `row` and `column` are the first ones' numbers in the tile.
template <class T, bool kNhwc, class Table>
__device__ __forceinline__ void store_vectors(const MmaProduct& p, const MmaBlock& block, const FlatEpilogue& end, T* y,
                                              const float* buffer, const Table& table, int row, int column) {
  constexpr int kAcross = 32 / kChunk<T>, kDown = 32 / kAcross;
  const int lane = threadIdx.x % 32, across = lane % kAcross * kChunk<T>;
#pragma unroll
  for (int i = 0; i < 16 / kDown; ++i) {
    const int down = lane / kAcross + i * kDown;
    const int own_channel = kNhwc ? column + across : row + down, own_pixel = kNhwc ? row + down : column + across;
    const int64_t place = place_of(p, block, block.first_pixel + own_pixel);
    if (place < 0 || block.first_channel + own_channel >= p.channels) continue;
    float value[kChunk<T>];
#pragma unroll
    for (int e = 0; e < kChunk<T>; e += 4) {
      const auto four = load_vector<4>(buffer + down * kBufferRow + across + e);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int channel = kNhwc ? own_channel + e + f : own_channel;
        value[e + f] = four[f] * table.scale[channel] + table.shift[channel];
      }
    }
    store_chunk(end, y, place + int64_t{block.first_channel + own_channel} * p.written.channel, value);
  }
}

/// The same, number by number: a warp stores neighbours.
template <class T, bool kNhwc, class Table>
__device__ __forceinline__ void store_numbers(const MmaProduct& p, const MmaBlock& block, const FlatEpilogue& end, T* y,
                                              const float* buffer, const Table& table, int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int down = 0; down < 16; ++down) {
    const int own_channel = kNhwc ? column + lane : row + down, own_pixel = kNhwc ? row + down : column + lane;
    const int64_t place = place_of(p, block, block.first_pixel + own_pixel);
    if (place < 0 || block.first_channel + own_channel >= p.channels) continue;
    const int64_t to = place + int64_t{block.first_channel + own_channel} * p.written.channel;
    const float value = buffer[down * kBufferRow + lane];
    y[to] = end.finish<T>(value * table.scale[own_channel] + table.shift[own_channel], to);
  }
}

/// Stores the warp's part of the tile. `buffer` is the warp's own.
template <class T, class Tile, bool kNhwc, class Table>
__device__ __forceinline__ void store_tile(const MmaProduct& p, const MmaBlock& block, const FlatEpilogue& end, T* y,
                                           const typename Tile::Sums& sum, float* buffer, const Table& table) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / Tile::kWarpsAcross * Tile::kWarpRows, column = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
#pragma unroll
  for (int m = 0; m < Tile::kFragmentRows; ++m) {
    __syncwarp();  // the rows before have been read
#pragma unroll
    for (int n = 0; n < Tile::kFragmentColumns; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vector<float, 2> two{{sum[m][n][2 * half], sum[m][n][2 * half + 1]}};
        store_vector(buffer + (lane / 4 + half * 8) * kBufferRow + n * 8 + lane % 4 * 2, two);
      }
    __syncwarp();
    if (p.stores_vectors) store_vectors<T, kNhwc>(p, block, end, y, buffer, table, row + m * 16, column);
    else store_numbers<T, kNhwc>(p, block, end, y, buffer, table, row + m * 16, column);
  }
}

}  // namespace
}  // namespace fastconv::cuda
