// Stems: convolutions of images, with at most 4 input channels. What the forward pass and the weight gradient share: a
// rectangle of outputs ("tile") and the slab of input rows that it needs, all channels, in shared memory.
//
// The slab holds float32, padded with zeros, its columns sorted by their remainder modulo the stride: tap s of
// neighbouring outputs is then at neighbouring addresses whatever the stride, where a stride of 4 would otherwise be a
// 4-way bank conflict.
#pragma once

#include <algorithm>

#include "conv2d/cuda_flat_epilogue.cuh"
#include "cuda_support/describe.h"
#include "cuda_support/device.h"
#include "cuda_support/dtype.h"
#include "cuda_support/fast_divide.h"

namespace fastconv::cuda {

inline constexpr int kStemThreads = 256;

struct StemTile {
  int rows = 1, columns = 1;        // of outputs
  int tiles_p = 1, tiles_q = 1;     // tiles of an image
  int slab_rows = 1, slab_columns;  // of inputs
  int phase_words = 1;              // of one remainder's columns in a row
  int row_words = 1;
  FastDivide by_columns, by_slab_columns, by_slab_rows, by_channels, by_stride;

  int pixels() const { return rows * columns; }
  int64_t slab_words(int64_t channels) const { return channels * slab_rows * row_words; }
  /// The slab and the offset of every tap.
  int64_t bytes(const ConvProblem& p) const { return (slab_words(p.c) + p.c * p.r * p.s) * int64_t{sizeof(float)}; }
};

/// How many lanes of a warp meet in one bank when lane i reads pixel i of the tile.
inline int bank_conflicts(int columns, int row_step_words) {
  int lanes[32] = {}, most = 0;
  for (int i = 0; i < 32; ++i) most = std::max(most, ++lanes[(i / columns * row_step_words + i % columns) % 32]);
  return most;
}

inline StemTile stem_tile(const ConvProblem& p, int rows, int columns) {
  StemTile tile;
  tile.rows = rows, tile.columns = columns;
  tile.tiles_p = static_cast<int>(ceil_div(p.p(), rows)), tile.tiles_q = static_cast<int>(ceil_div(p.q(), columns));
  tile.slab_rows = static_cast<int>((rows - 1) * p.stride.h + p.r);
  tile.slab_columns = static_cast<int>((columns - 1) * p.stride.w + p.s);
  const int stride = static_cast<int>(p.stride.w), down = static_cast<int>(p.stride.h);
  tile.phase_words = static_cast<int>(ceil_div(tile.slab_columns, stride));
  const int words = stride * tile.phase_words;
  int least = 33;
  for (int pad = 0; pad < 32; ++pad) {
    const int conflicts = bank_conflicts(columns, down * (words + pad));
    if (conflicts < least) least = conflicts, tile.row_words = words + pad;
  }
  tile.by_columns = FastDivide(columns);
  tile.by_slab_columns = FastDivide(tile.slab_columns);
  tile.by_slab_rows = FastDivide(tile.slab_rows);
  tile.by_channels = FastDivide(p.c);
  tile.by_stride = FastDivide(stride);
  return tile;
}

/// The rectangle of at most `pixels` outputs that wastes the fewest over the whole image, then the smallest slab, with
/// shared memory for itself within `budget`.
inline StemTile choose_stem_tile(const ConvProblem& p, int pixels, int64_t budget) {
  StemTile best;
  int64_t best_cost = INT64_MAX;
  for (int columns = 1; columns <= std::min<int64_t>(p.q(), pixels); ++columns) {
    const int rows = static_cast<int>(std::min<int64_t>(pixels / columns, p.p()));
    const int64_t tiles = ceil_div(p.p(), rows) * ceil_div(p.q(), columns);
    const int64_t slab = ((rows - 1) * p.stride.h + p.r) * ((columns - 1) * p.stride.w + p.s + 32) * p.c;
    if ((slab + p.c * p.r * p.s) * int64_t{sizeof(float)} > budget && pixels > 1) continue;
    // A pixel of waste costs all of its taps and filters, a word of the slab one load and one store.
    const int64_t cost = tiles * (pixels * p.c * p.r * p.s + slab);
    if (cost < best_cost) best_cost = cost, best = stem_tile(p, rows, columns);
  }
  return best_cost == INT64_MAX ? stem_tile(p, 1, 1) : best;
}

/// Offset in the slab of each tap, ordered (channel, row, column), relative to a pixel's own.
__device__ __forceinline__ void fill_tap_offsets(const ConvProblem& p, const StemTile& tile, int* offsets) {
  const int window = static_cast<int>(p.r * p.s), columns = static_cast<int>(p.s);
  for (int tap = threadIdx.x; tap < static_cast<int>(p.c) * window; tap += kStemThreads) {
    const int c = tap / window, r = tap % window / columns, s = tap % columns, stride = static_cast<int>(p.stride.w);
    offsets[tap] = (c * tile.slab_rows + r) * tile.row_words + s % stride * tile.phase_words + s / stride;
  }
}

/// Where a pixel of the tile starts in the slab.
__device__ __forceinline__ int pixel_offset(const ConvProblem& p, const StemTile& tile, uint32_t pixel) {
  const uint32_t row = tile.by_columns.divide_keep_rest(pixel);
  return static_cast<int>(row * static_cast<uint32_t>(p.stride.h) * tile.row_words + pixel);
}

/// Copies the inputs of the tile whose first output is (row, column), zeros outside the image. `image` is the image's
/// first element. Neighbouring threads read neighbouring elements of either layout.
template <class T>
__device__ __forceinline__ void fill_slab(const ConvProblem& p, const StemTile& tile, const T* image, int row,
                                          int column, float* slab) {
  const int top = row * static_cast<int>(p.stride.h) - static_cast<int>(p.padding.top);
  const int left = column * static_cast<int>(p.stride.w) - static_cast<int>(p.padding.left);
  const int height = static_cast<int>(p.h), width = static_cast<int>(p.w), channels = static_cast<int>(p.c);
  for (int i = threadIdx.x; i < channels * tile.slab_rows * tile.slab_columns; i += kStemThreads) {
    uint32_t c = 0, r, s = i;
    if (p.layout == Layout::nchw) {
      r = tile.by_slab_columns.divide_keep_rest(s);
      c = tile.by_slab_rows.divide_keep_rest(r);
    } else {
      c = s;
      s = tile.by_channels.divide_keep_rest(c);
      r = tile.by_slab_columns.divide_keep_rest(s);
    }
    const int h = top + static_cast<int>(r), w = left + static_cast<int>(s);
    float value = 0;
    if (static_cast<uint32_t>(h) < static_cast<uint32_t>(height) &&
        static_cast<uint32_t>(w) < static_cast<uint32_t>(width)) {
      const int plane = static_cast<int>(c);
      value = to_float(
          image[p.layout == Layout::nchw ? (plane * height + h) * width + w : (h * width + w) * channels + plane]);
    }
    uint32_t phase = s;
    const uint32_t at = tile.by_stride.divide_keep_rest(phase);
    slab[(c * tile.slab_rows + r) * tile.row_words + phase * tile.phase_words + at] = value;
  }
}

/// Scale and shift are in a table in shared memory, the layout is two strides.
struct StemEpilogue : FlatEpilogue {
  int filter_stride = 1, pixel_stride = 1;

  StemEpilogue(const ConvProblem& p, const CudaEpilogue& epilogue) : FlatEpilogue(epilogue) {
    const Strides4 strides = p.output_strides();
    filter_stride = static_cast<int>(strides.c), pixel_stride = static_cast<int>(strides.w);
  }
};

/// table[filter] = scale, table[filters + filter] = shift.
__device__ __forceinline__ void fill_scales(const CudaEpilogue& epilogue, int first_filter, int filters, int all,
                                            float* table) {
  for (int f = threadIdx.x; f < min(filters, all - first_filter); f += kStemThreads) {
    table[f] = epilogue.scale.data != nullptr ? epilogue.scale.at(first_filter + f) : 1.0f;
    table[filters + f] = epilogue.shift.data != nullptr ? epilogue.shift.at(first_filter + f) : 0.0f;
  }
}

}  // namespace fastconv::cuda
