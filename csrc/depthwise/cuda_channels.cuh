// NHWC: how channels and positions are divided among threads, and how a thread reaches them.
//
// Neighbouring threads own neighbouring vectors of channels, so every load and store of a warp is contiguous, and no
// shared memory is needed for maps: the column that two threads of a block both read comes from L1. A vector is as long
// as the registers allow beside the weights (kChannelVector): 8 bytes of a 3x3 window's channels, 4 of 5x5's, one
// channel of 7x7. Longer vectors would move the same sectors with fewer warps to hide the latency, or would have to
// fetch weights from shared memory at every step: 25 16-byte loads for the 200 multiply-adds of a 5x5 row, which is
// slower than the maps arrive from memory.
#pragma once

#include <algorithm>

#include "conv2d/cuda_epilogue.cuh"
#include "cuda_support/device.h"
#include "depthwise/cuda_pass.h"

namespace fastconv::cuda {

inline constexpr int kChannelThreads = 128;
/// Blocks that must fit on a multiprocessor: a thread may have 65536 / 128 / this many registers. The 49 sums of a 7x7
/// weight gradient need more than 128.
constexpr int channel_blocks_per_sm(int window) { return window == 7 ? 3 : 4; }
inline constexpr int kChannelTile = 64;  // vectors of a block, at most: 512 bytes in 3x3

template <class T, int kWindow>
inline constexpr int kChannelVector = kWindow == 7 ? 1 : (kWindow == 3 ? 8 : 4) / static_cast<int>(sizeof(T));

/// Columns of a thread: two where the registers allow it. With stride 2 two windows share little anyway.
constexpr int channel_columns(int window, int stride) { return window == 3 || (window == 5 && stride == 1) ? 2 : 1; }

/// A block is (tile vectors of channels, items): threadIdx.x is the vector, threadIdx.y the item, which is a chunk of
/// rows in one or two columns (or one column of cells) of one image. Columns are fastest.
struct ChannelBlocks {
  int64_t items = 0;
  int vectors = 0, tile = 0;           // of the tensor; of a block
  int chunk_rows = 0, per_thread = 1;  // items of a thread, blockDim.y apart
  FastDivide chunks, columns;
  unsigned item_blocks = 1, tiles = 1;

  dim3 grid() const { return dim3(item_blocks, tiles); }
  dim3 block() const { return dim3(static_cast<unsigned>(tile), static_cast<unsigned>(kChannelThreads / tile)); }
};

/// `columns`: items in a row of an image.
inline ChannelBlocks divide_channels(int64_t images, int64_t channels, int64_t rows, int64_t columns, int vector) {
  ChannelBlocks blocks;
  blocks.vectors = static_cast<int>(channels / vector);
  blocks.tiles = static_cast<unsigned>(ceil_div(blocks.vectors, kChannelTile));
  blocks.tile = static_cast<int>(ceil_div(blocks.vectors, blocks.tiles));
  // Long chunks read few rows twice; but 1024 threads per multiprocessor, four times over, even out the last wave.
  const int64_t wanted = int64_t{device_properties().sm_count} * 4096;
  int64_t chunk = std::min<int64_t>(rows, 32);
  while (chunk > 4 && images * ceil_div(rows, chunk) * columns * blocks.vectors < wanted) chunk = ceil_div(chunk, 2);
  chunk = ceil_div(rows, ceil_div(rows, chunk));  // chunks of equal length
  blocks.chunk_rows = static_cast<int>(chunk);
  blocks.chunks = FastDivide(ceil_div(rows, chunk));
  blocks.columns = FastDivide(columns);
  blocks.items = images * blocks.chunks.divisor * columns;
  // Several items per thread share the weights that a block fetches.
  blocks.per_thread = static_cast<int>(std::clamp<int64_t>(blocks.items * blocks.vectors / wanted, 1, 8));
  const int64_t per_block = int64_t{kChannelThreads / blocks.tile} * blocks.per_thread;
  if (blocks.items > 0x7fffffff)
    throw std::runtime_error("a depthwise pass of " + std::to_string(blocks.items) +
                             " items, expected fewer than 2^31; split the batch");
  blocks.item_blocks = static_cast<unsigned>(ceil_div(blocks.items, per_block));
  return blocks;
}

/// Item `index`: its image, column of items, and rows of positions.
struct ChannelItem {
  int64_t image;
  int column, first, last;

  __device__ __forceinline__ ChannelItem(uint32_t index, const ChannelBlocks& blocks, int rows) {
    uint32_t chunk = blocks.columns.divide_keep_rest(index);
    column = static_cast<int>(index);
    image = blocks.chunks.divide_keep_rest(chunk);
    first = static_cast<int>(chunk) * blocks.chunk_rows;
    last = min(first + blocks.chunk_rows, rows);
  }
};

/// The end of the rows that positions up to `last` - 1 read: the loops ask for one row more, which need not be fetched.
__device__ __forceinline__ int rows_read(const PassAxis& axis, int last, int step, int reach) {
  return max(0, min(axis.in, (last - 1) * step - axis.pad + reach));
}

/// Loads kCount vectors of a row of an image, zeros where the image has none.
///
/// Offsets are unsigned: for signed ones, which may not overflow, the compiler keeps a running 64-bit pointer for every
/// load of the unrolled loops (112 registers in a 7x7 window).
template <class T, int kV, int kCount>
struct ChannelReader {
  const T* image;                   // at the thread's channels
  uint32_t first, step, row_elems;  // offset of the first column in row 0; from column to column; from row to row
  uint32_t row_end;
  unsigned inside = 0;  // bit i: column i exists

  __device__ __forceinline__ ChannelReader(const T* from, int channels, int width, int rows, int first_column)
      : image(from), first(first_column * channels), step(channels), row_elems(width * channels), row_end(rows) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      inside |= (static_cast<unsigned>(first_column + i) < static_cast<unsigned>(width) ? 1u : 0u) << i;
  }

  __device__ __forceinline__ void operator()(int row, Packed<T, kV> (&to)[kCount]) const {
    const unsigned exists = static_cast<uint32_t>(row) < row_end ? inside : 0u;
    uint32_t from = first + static_cast<uint32_t>(row) * row_elems;
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += step) to[i].load(image + from, exists >> i & 1);
  }
};

}  // namespace fastconv::cuda
