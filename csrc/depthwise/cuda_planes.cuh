// NCHW: how planes are divided among blocks, and how a block brings them to shared memory.
//
// A block takes planes that follow each other in memory (or one strip of rows of one plane), so what it reads is one
// contiguous range: it is copied by 16-byte cp.async whatever the width of the map, without padding. Borders are
// predicates of the loads from shared memory. A 7x7 plane of fp16 has 98 bytes: neither its rows nor the plane itself
// could be read in 16-byte pieces.
#pragma once

#include <algorithm>

#include "cuda_support/device.h"
#include "cuda_support/ptx.cuh"
#include "depthwise/cuda_pass.h"

namespace fastconv::cuda {

inline constexpr int kPlaneThreads = 256;
/// What a block copies at a time. Eight blocks fit on an A100's multiprocessor and nine on an H100's, so that some wait
/// for memory while others compute.
inline constexpr int64_t kPlaneBytes = 24 << 10;

/// Copies `count` elements to shared memory at `to`, which has 16 bytes more than they need, and returns where they
/// are. The caller waits for cp.async and for the other threads.
template <class T>
__device__ __forceinline__ const T* stage(unsigned char* to, const T* from, int count) {
  constexpr int kPiece = kVectorElements<T>;
  // The copy has the original's offset modulo 16 bytes: then the aligned pieces of one are those of the other.
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  T* copy = reinterpret_cast<T*>(to) + skew;
  const int head = min(count, (kPiece - skew) % kPiece), pieces = (count - head) / kPiece;
  for (int i = threadIdx.x; i < pieces; i += kPlaneThreads)
    ptx::cp_async_cg_16(ptx::shared_address(copy + head + i * kPiece), from + head + i * kPiece);
  for (int i = threadIdx.x; i < count - pieces * kPiece; i += kPlaneThreads) {  // less than a piece at either end
    const int at = i < head ? i : i + pieces * kPiece;
    copy[at] = from[at];
  }
  return copy;
}

/// How the positions of a pass (cuda_pass.h) are divided. A block has `planes` planes whole or, if there are several
/// strips, `strip_rows` rows of one plane. A thread's item is a chunk of rows in two columns; columns are fastest, so
/// that a warp is full on 7x7 planes too.
struct PlaneBlocks {
  int64_t total = 0;  // planes of the tensor
  int planes = 1, strips = 1, strip_rows = 0, chunk_rows = 0;
  FastDivide chunks, columns, channels;  // chunks of a strip, items in a row, channels

  unsigned grid() const { return static_cast<unsigned>(ceil_div(total, planes) * strips); }
};

/// Rows of a chunk: `rows` x `columns` x `planes` items of one row are divided so that 256 threads do it in the fewest
/// steps. A chunk costs kLive - 1 steps to fill and about four more for its weights and addresses.
inline int choose_chunk_rows(int64_t rows, int64_t columns, int64_t planes, int overlap) {
  int64_t best = rows, best_cost = INT64_MAX;
  for (int64_t chunks = 1; chunks <= rows; ++chunks) {
    const int64_t chunk = ceil_div(rows, chunks);
    const int64_t cost = ceil_div(planes * columns * ceil_div(rows, chunk), kPlaneThreads) * (chunk + overlap + 4);
    if (cost < best_cost) best = chunk, best_cost = cost;
  }
  return static_cast<int>(best);
}

/// row_bytes: what a block keeps in shared memory per row that it reads.
inline PlaneBlocks divide_planes(const DepthwisePass& pass, int columns, int64_t row_bytes, int64_t budget) {
  PlaneBlocks blocks;
  blocks.total = pass.images * pass.channels;
  const int64_t plane_bytes = row_bytes * pass.h.in, rows = pass.h.positions;
  const int64_t wanted = 4 * int64_t{device_properties().sm_count};  // blocks, so that all multiprocessors have some
  blocks.planes = static_cast<int>(
      std::clamp<int64_t>(std::min(budget / std::max<int64_t>(plane_bytes, 1), blocks.total / wanted), 1, 4096));
  int64_t strip = rows;
  if (blocks.planes == 1) {
    const int64_t fit = (budget / row_bytes - pass.reach) / pass.step + 1;  // rows that the budget allows
    const int64_t few = std::max<int64_t>(8, rows * blocks.total / wanted);
    strip = std::clamp<int64_t>(std::min(plane_bytes > budget ? fit : rows, few), 1, rows);
  }
  blocks.strips = static_cast<int>(ceil_div(rows, strip));
  blocks.strip_rows = static_cast<int>(ceil_div(rows, blocks.strips));
  blocks.strips = static_cast<int>(ceil_div(rows, blocks.strip_rows));
  const int overlap = ceil_div(pass.reach, pass.step) - 1;
  blocks.chunk_rows = choose_chunk_rows(blocks.strip_rows, columns, blocks.planes, overlap);
  blocks.chunks = FastDivide(ceil_div(blocks.strip_rows, blocks.chunk_rows));
  blocks.columns = FastDivide(columns);
  blocks.channels = FastDivide(pass.channels);
  if (ceil_div(blocks.total, blocks.planes) * blocks.strips > 0x7fffffff)
    throw std::runtime_error("the " + pass.describe() + " needs more than 2^31 - 1 blocks; split the batch");
  return blocks;
}

/// Elements per plane that a block may have to stage.
inline int64_t staged_rows(const DepthwisePass& pass, const PlaneBlocks& blocks) {
  const int64_t strip = int64_t{blocks.strip_rows - 1} * pass.step + pass.reach;
  return blocks.strips == 1 ? pass.h.in : std::min<int64_t>(pass.h.in, strip);
}

/// Which planes and rows a block has.
struct PlaneRange {
  int64_t first_plane;
  int planes, first_row, last_row;  // of positions
  int read_begin, read_end;         // rows that are staged
  int first_channel;

  __device__ __forceinline__ PlaneRange(const PlaneBlocks& blocks, const DepthwisePass& pass) {
    const unsigned group = blocks.strips == 1 ? blockIdx.x : blockIdx.x / blocks.strips;
    first_plane = int64_t{group} * blocks.planes;
    planes = static_cast<int>(min(int64_t{blocks.planes}, blocks.total - first_plane));
    first_channel = static_cast<int>(first_plane % blocks.channels.divisor);
    first_row = static_cast<int>(blockIdx.x - group * blocks.strips) * blocks.strip_rows;
    last_row = min(first_row + blocks.strip_rows, pass.h.positions);
    read_begin = 0, read_end = pass.h.in;
    if (blocks.strips > 1) {
      read_end = max(0, min(read_end, (last_row - 1) * pass.step - pass.h.pad + pass.reach));
      read_begin = min(read_end, max(0, first_row * pass.step - pass.h.pad));
    }
  }
};

/// Item `index` of a block.
struct PlaneItem {
  int plane, column, first, last;  // plane of the block; column of items; rows of positions
  int channel;

  __device__ __forceinline__ PlaneItem(uint32_t index, const PlaneBlocks& blocks, const PlaneRange& range) {
    const uint32_t rest = blocks.columns.divide_keep_rest(index);
    column = static_cast<int>(index);
    uint32_t chunk = rest;
    plane = static_cast<int>(blocks.chunks.divide_keep_rest(chunk));
    first = range.first_row + static_cast<int>(chunk) * blocks.chunk_rows;
    last = min(first + blocks.chunk_rows, range.last_row);
    uint32_t over = static_cast<uint32_t>(range.first_channel + plane);
    blocks.channels.divide_keep_rest(over);
    channel = static_cast<int>(over);
  }
};

/// Loads kCount elements of a row of a staged plane, zeros where the plane has none.
template <class T, int kCount>
struct PlaneReader {
  const T* staged;
  uint32_t origin;  // of row 0 and the first column, relative to `staged`; unsigned, see ChannelReader
  uint32_t width, row_end;
  unsigned inside = 0;  // bit i: column i exists

  __device__ __forceinline__ PlaneReader(const T* tile, int row_zero, int row_width, int rows, int first_column)
      : staged(tile), origin(row_zero + first_column), width(row_width), row_end(rows) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) inside |= (static_cast<uint32_t>(first_column + i) < width ? 1u : 0u) << i;
  }

  __device__ __forceinline__ void operator()(int row, Packed<T, 1> (&to)[kCount]) const {
    const unsigned exists = static_cast<uint32_t>(row) < row_end ? inside : 0u;
    const uint32_t from = origin + static_cast<uint32_t>(row) * width;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i].load(staged + (from + i), exists >> i & 1);
  }
};

}  // namespace fastconv::cuda
