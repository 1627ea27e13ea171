// The weight gradient as implicit GEMM with output channels in lanes: rows of a tile are weights of one output channel,
// (input channel, tap) pairs, and the depth runs over pixels.
//
// Of the two operands only grad_y must be rearranged, into panels [pixel][kTileColumns channels]: once per pixel, not
// once per pixel and tap. x is broadcast element by element, so a tap is nothing but another start address in a copy of
// the input with its padding around it (or in the input itself if it has none).
//
// A task owns a block of input channels and one share of the pixels. Shares are added in order at the end, and their
// number depends on the problem alone: results do not change from run to run, nor with the number of threads.
#pragma once

#include "conv2d/cpu_input_copy.h"
#include "conv2d/cpu_transpose.h"

namespace fastconv {
namespace {

struct WeightGradPlan {
  InputCopy input;
  int64_t images_per_chunk, rows_per_chunk, chunks_per_image, chunks;  // pixels reduced at a time
  int64_t channels_per_block, blocks;                                  // input channels
  int64_t panels;                                                      // of output channels
  int64_t shares;
  bool transposed;  // the roles of input and grad_y are exchanged

  WeightGradPlan(const GemmWeightGrad& p, int64_t tile_columns, bool same_type, int64_t element_bytes)
      : input(p, same_type, ceil_div(p.m, tile_columns)), transposed(false) {
    constexpr int64_t kChunk = 256;  // a panel of 16 KiB and six rows of input share a 32 KiB L1
    constexpr int64_t kCopyBytes = 160 * 1024, kTasks = 16, kPixelsPerShare = 1024;
    constexpr int64_t kFewestWeights = 96;  // packing a pixel of grad_y costs about as much as six rows of products
    rows_per_chunk = min_of(p.i, ceil_div(p.i, ceil_div(p.i * p.j, kChunk)));
    images_per_chunk = rows_per_chunk < p.i ? 1 : min_of(p.n, max_of(1, kChunk / (p.i * p.j)));
    chunks_per_image = ceil_div(p.i, rows_per_chunk);
    chunks = ceil_div(p.n, images_per_chunk) * chunks_per_image;
    input.set_chunk(images_per_chunk, rows_per_chunk);
    panels = ceil_div(p.m, tile_columns);
    // A share is worth its own sums only if it has far more products to add than sums to keep.
    const int64_t most_shares = max_of(1, min_of(chunks, p.n * p.i * p.j / kPixelsPerShare));
    const int64_t fitting = max_of(1, kCopyBytes / (images_per_chunk * input.channel_elems() * element_bytes));
    const int64_t fewest_channels = min_of(p.c, ceil_div(kFewestWeights, p.tap_count));
    const int64_t wanted = min_of(ceil_div(kTasks, p.groups * most_shares), p.c / fewest_channels);
    channels_per_block = input.set_block(p, ceil_div(p.c, max_of(ceil_div(p.c, fitting), wanted)));
    blocks = ceil_div(p.c, channels_per_block);
    shares = min_of(most_shares, ceil_div(kTasks, p.groups * blocks));
  }

  ImageRows chunk(const GemmWeightGrad& p, int64_t index) const {
    const int64_t image = index / chunks_per_image * images_per_chunk;
    const int64_t row = index % chunks_per_image * rows_per_chunk;
    return {image, min_of(images_per_chunk, p.n - image), row, min_of(rows_per_chunk, p.i - row)};
  }
  int64_t block_channels(const GemmWeightGrad& p, int64_t block) const {
    return min_of(channels_per_block, p.c - block * channels_per_block);
  }
  /// Sums of one task: [panel][weight of the block][kTileColumns].
  int64_t task_sums(const GemmWeightGrad& p, int64_t tile_columns) const {
    return panels * channels_per_block * p.tap_count * tile_columns;
  }
};

inline bool is_pointwise(const GemmWeightGrad& p) {
  return p.tap_count == 1 && p.taps[0].dh == 0 && p.taps[0].dw == 0 && p.step.h == 1 && p.step.w == 1 && p.i == p.h &&
         p.j == p.w;
}

/// Of a 1x1 convolution without stride either operand may be the one that is rearranged: x and grad_y exchanged give
/// the transposed gradient.
inline GemmWeightGrad exchanged(GemmWeightGrad p) {
  const GemmWeightGrad original = p;
  p.c = original.m, p.m = original.c;
  p.x = original.grad_y, p.x_strides = original.grad_y_strides;
  p.grad_y = original.x, p.grad_y_strides = original.x_strides;
  return p;
}

/// grad_y as a panel: [pixel of the chunk][lane], channels m, m + 1, ... of a group; unused lanes are not written.
template <class T>
void pack_gradient_panel(const GemmWeightGrad& p, const ImageRows& chunk, int64_t group, int64_t m, int64_t lanes,
                         acc_t<T>* panel) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kLane = simd::kLanes<Acc>;
  const int64_t pixels = chunk.row_count * p.j;
  for (int64_t image = 0; image < chunk.image_count; ++image, panel += pixels * kColumns) {
    const T* grad = static_cast<const T*>(p.grad_y) + (chunk.image + image) * p.grad_y_strides.n +
                    (group * p.m + m) * p.grad_y_strides.c + chunk.row * p.grad_y_strides.h;
    if (p.layout == Layout::nchw) {
      transpose_rows<T>(grad, p.grad_y_strides.c, lanes, pixels, panel, kColumns);
      continue;
    }
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t lane = 0; lane < lanes; lane += kLane) {
        const T* source = grad + pixel * p.grad_y_strides.w + lane;
        simd::store<Acc>(panel + pixel * kColumns + lane,
                         lane + kLane <= lanes ? simd::load(source) : simd::load_first(source, lanes - lane));
      }
  }
}

template <class Acc>
struct WeightGradScratch {
  Acc* copy;   // of the input
  Acc* panel;  // of grad_y
  int64_t* row_offsets;
  const int64_t* depth_offsets;
};

/// Adds one chunk of pixels to the sums of a block of channels; the first chunk starts them.
template <class T>
void add_chunk(const GemmWeightGrad& p, const WeightGradPlan& plan, int64_t group, int64_t block,
               const ImageRows& chunk, bool first, const WeightGradScratch<acc_t<T>>& scratch, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t channels = plan.block_channels(p, block), weights = channels * p.tap_count;
  const int64_t first_channel = group * p.c + block * plan.channels_per_block;
  TileCall<Acc> call{};
  call.a = plan.input.template prepare<T>(p, chunk, first_channel, channels, scratch.copy);
  call.a_depth_offsets = scratch.depth_offsets;
  call.b = scratch.panel;
  call.depth = chunk.image_count * chunk.row_count * p.j;
  call.out_stride = kColumns;
  call.accumulate = !first;
  const RowTiles tiles(weights);
  for (int64_t panel = 0; panel < plan.panels; ++panel) {
    const int64_t m = panel * kColumns, lanes = min_of(kColumns, p.m - m);
    pack_gradient_panel<T>(p, chunk, group, m, lanes, scratch.panel);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t row = tiles.begin(tile);
      call.a_row_offsets = scratch.row_offsets + row;
      call.out = sums + (panel * weights + row) * kColumns;
      kTiles<Acc, Rows::offsets>.at(tiles.begin(tile + 1) - row, lanes)(call);
    }
  }
}

/// Adds the shares of one task's sums, in order, into the first, and writes them as weights.
template <class T>
void write_block(const GemmWeightGrad& p, const WeightGradPlan& plan, int64_t group, int64_t block, acc_t<T>* sums,
                 int64_t share_stride) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t channels = plan.block_channels(p, block), first_channel = block * plan.channels_per_block;
  const int64_t weights = channels * p.tap_count, per_output = p.c * p.tap_count;
  const bool nchw = p.layout == Layout::nchw;
  // Weights that lie side by side both in the sums and in the result: the block, or in NHWC its channels for one tap.
  const int64_t run = nchw ? weights : channels;
  for (int64_t panel = 0; panel < plan.panels; ++panel, sums += weights * kColumns) {
    for (int64_t i = 0; i < weights * kColumns; i += simd::kLanes<Acc>) {
      auto total = simd::load(sums + i);
      for (int64_t share = 1; share < plan.shares; ++share) total += simd::load(sums + share * share_stride + i);
      if (plan.shares > 1) simd::store<Acc>(sums + i, total);
    }
    const int64_t m = panel * kColumns, lanes = min_of(kColumns, p.m - m);
    if (plan.transposed) {
      T* target = static_cast<T*>(p.grad_weight) + (group * p.c + first_channel) * p.m + m;
      for (int64_t row = 0; row < weights; ++row)
        for (int64_t lane = 0; lane < lanes; ++lane)
          target[row * p.m + lane] = simd::narrow<T>(sums[row * kColumns + lane]);
      continue;
    }
    for (int64_t begin = 0; begin < weights; begin += run) {
      T* target = static_cast<T*>(p.grad_weight) + (group * p.m + m) * per_output +
                  (nchw ? first_channel * p.tap_count : begin / run * p.c + first_channel);
      const Acc* source = sums + begin * kColumns;
      if constexpr (sizeof(T) == sizeof(Acc)) {
        transpose_rows<Acc>(source, kColumns, run, lanes, target, per_output);
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t i = 0; i < run; ++i)
            target[lane * per_output + i] = simd::narrow<T>(source[i * kColumns + lane]);
      }
    }
  }
}

template <class T>
void weight_grad_tiled(const GemmWeightGrad& problem) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kBytes = sizeof(Acc), kOffsetBytes = sizeof(int64_t);
  const bool transposed = is_pointwise(problem) && problem.m > problem.c;
  const GemmWeightGrad p = transposed ? exchanged(problem) : problem;
  WeightGradPlan plan(p, kColumns, sizeof(T) == sizeof(Acc), kBytes);
  plan.transposed = transposed;
  const int64_t task_sums = plan.task_sums(p, kColumns), share_sums = p.groups * plan.blocks * task_sums;
  const int64_t depth = plan.images_per_chunk * plan.rows_per_chunk * p.j;
  Scratch shared_sums(plan.shares > 1 ? plan.shares * share_sums * kBytes : 0);
  Scratch depth_offsets(depth * kOffsetBytes);
  plan.input.fill_depth_offsets(p, depth_offsets.as<int64_t>());

  parallel_for(0, plan.shares * p.groups * plan.blocks, 1, [&](int64_t task_begin, int64_t task_end) {
    Scratch copy(plan.input.buffer_elems() * kBytes);
    Scratch panel(depth * kColumns * kBytes);
    Scratch row_offsets(plan.channels_per_block * p.tap_count * kOffsetBytes);
    Scratch own_sums(plan.shares > 1 ? 0 : task_sums * kBytes);
    std::memset(panel.as<Acc>(), 0, static_cast<size_t>(depth * kColumns * kBytes));
    const WeightGradScratch<Acc> scratch{copy.as<Acc>(), panel.as<Acc>(), row_offsets.as<int64_t>(),
                                         depth_offsets.as<int64_t>()};
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t block = task % plan.blocks, group = task / plan.blocks % p.groups;
      const int64_t share = task / plan.blocks / p.groups;
      Acc* sums = plan.shares > 1 ? shared_sums.as<Acc>() + task * task_sums : own_sums.as<Acc>();
      plan.input.fill_row_offsets(p, plan.block_channels(p, block), scratch.row_offsets);
      const int64_t first = plan.chunks * share / plan.shares, last = plan.chunks * (share + 1) / plan.shares;
      for (int64_t chunk = first; chunk < last; ++chunk)
        add_chunk<T>(p, plan, group, block, plan.chunk(p, chunk), chunk == first, scratch, sums);
      if (plan.shares == 1) write_block<T>(p, plan, group, block, sums, 0);
    }
  });
  if (plan.shares == 1) return;
  parallel_for(0, p.groups * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      write_block<T>(p, plan, task / plan.blocks, task % plan.blocks, shared_sums.as<Acc>() + task * task_sums,
                     share_sums);
  });
}

}  // namespace
}  // namespace fastconv
