// The weight gradient for NHWC: channels in lanes. A tile of kTileColumns columns adds to sums that stay in L1, one
// vector per tap: 27 loads of input, 7 of grad_y and 9 loads and stores of sums for the 63 fused multiply-adds of a 3x3
// window.
#pragma once

#include "depthwise/cpu_channel_kernels.h"

namespace fastconv {
namespace {

/// One run of columns of grad_y; x as in ChannelTile. sums[tap * sums_pitch + c].
template <class X, class T>
struct GradTile {
  const X* const* x;
  int64_t x_pitch, step, spacing;
  int64_t tap_rows, tap_columns;
  const T* const* grad;
  acc_t<T>* sums;
  int64_t sums_pitch, channels;
};

/// Any number of tap rows, kTapColumns columns side by side.
template <class X, class T, int kTapColumns, int kStep>
void add_window_tile(const GradTile<X, T>& argument) {
  const GradTile<X, T> tile = argument;  // or gcc reloads it after every store of sums
  using Acc = acc_t<T>;
  using V = simd::Vec<Acc>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  constexpr int kWidth = (kTileColumns - 1) * kStep + kTapColumns;
  for (int64_t c = 0; c < tile.channels; c += kLane) {
    V factors[kTileColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) factors[j] = simd::load(tile.grad[j] + c);
    const X* const* x = tile.x;
    Acc* kept = tile.sums + c;
#pragma GCC unroll 1  // see window_tile
    for (int64_t r = 0; r < tile.tap_rows; ++r, x += tile.x_pitch, kept += kTapColumns * tile.sums_pitch) {
      V sums[kTapColumns];
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) sums[s] = simd::load(kept + s * tile.sums_pitch);
#pragma GCC unroll 32
      for (int e = 0; e < kWidth; ++e) {
        const V value = simd::load(x[e] + c);
#pragma GCC unroll 8
        for (int s = 0; s < kTapColumns; ++s) {
          const int j = (e - s) / kStep;
          if (e >= s && (e - s) % kStep == 0 && j < kTileColumns) sums[s] = simd::fma<Acc>(value, factors[j], sums[s]);
        }
      }
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) simd::store<Acc>(kept + s * tile.sums_pitch, sums[s]);
    }
  }
}

template <class X, class T>
void add_any_window_tile(const GradTile<X, T>& tile) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  for (int64_t c = 0; c < tile.channels; c += kLane) {
    const int64_t live = min_of(kLane, tile.channels - c);
    const auto fetch = [&](const auto* source) {
      return live == kLane ? simd::load(source) : simd::load_first(source, live);
    };
    simd::Vec<Acc> factors[kTileColumns];
    for (int j = 0; j < kTileColumns; ++j) factors[j] = fetch(tile.grad[j] + c);
    for (int64_t r = 0; r < tile.tap_rows; ++r)
      for (int64_t s = 0; s < tile.tap_columns; ++s) {
        Acc* kept = tile.sums + (r * tile.tap_columns + s) * tile.sums_pitch + c;
        auto total = simd::load(kept);
        const X* const* x = tile.x + r * tile.x_pitch + s * tile.spacing;
        for (int j = 0; j < kTileColumns; ++j) total = simd::fma<Acc>(fetch(x[j * tile.step] + c), factors[j], total);
        simd::store<Acc>(kept, total);
      }
  }
}

template <class X, class T>
using AddTile = void (*)(const GradTile<X, T>&);

template <class X, class T>
AddTile<X, T> add_tile_kernel(const ConvProblem& p, int64_t channels) {
  // X and T differ only for a channel multiplier of 16-bit tensors: not worth kernels of its own.
  if constexpr (__is_same(X, T)) {
    if (channels % simd::kLanes<acc_t<T>> == 0 && p.dilation.w == 1) {
      if (p.s == 3 && p.stride.w == 1) return &add_window_tile<X, T, 3, 1>;
      if (p.s == 3 && p.stride.w == 2) return &add_window_tile<X, T, 3, 2>;
      if (p.s == 5 && p.stride.w == 1) return &add_window_tile<X, T, 5, 1>;
      if (p.s == 5 && p.stride.w == 2) return &add_window_tile<X, T, 5, 2>;
    }
  }
  return &add_any_window_tile<X, T>;
}

struct ChannelGradPlan {
  int64_t block, blocks;  // of filters
  int64_t rows, shares;   // of grad_y; rows per share, shares per image
  int64_t width;          // of the pointer table
  int64_t x_rows;         // per share

  ChannelGradPlan(const ConvProblem& p, int64_t lanes) {
    constexpr int64_t kTasks = 16;
    const int64_t wanted = channels_per_block(p.r * p.w * element_bytes(p.dtype));
    // With a multiplier, channels are repeated for whole rows of x at once, so one block takes them all.
    blocks = p.k_per_group() > 1 ? 1 : ceil_div(p.k, wanted);
    block = round_up(ceil_div(p.k, blocks), lanes);
    blocks = ceil_div(p.k, block);
    shares = max_of(1, min_of(ceil_div(kTasks, blocks * p.n), p.p() / 4));
    rows = ceil_div(p.p(), shares);
    shares = ceil_div(p.p(), rows);
    width = (round_up(p.q(), kTileColumns) - 1) * p.stride.w + (p.s - 1) * p.dilation.w + 1;
    x_rows = (rows - 1) * p.stride.h + (p.r - 1) * p.dilation.h + 1;
  }
};

/// Memory of one thread.
template <class T>
struct ChannelGradScratch {
  const void** x_table;
  const T** grad_table;
  const void* zeros;
  acc_t<T>* repeated;
};

/// Adds rows [begin, end) of one image. `grad` points at its row 0 and at the first of `channels` channels.
template <class X, class T>
void add_grad_rows(const ConvProblem& p, const ChannelGradPlan& plan, const ChannelImage<X>& image, const T* grad,
                   int64_t begin, int64_t end, int64_t channels, acc_t<T>* sums, const ChannelGradScratch<T>& scratch) {
  const X** x_table = reinterpret_cast<const X**>(scratch.x_table);
  const AddTile<X, T> add = add_tile_kernel<X, T>(p, channels);
  GradTile<X, T> tile{};
  tile.x_pitch = p.dilation.h * plan.width, tile.step = p.stride.w, tile.spacing = p.dilation.w;
  tile.tap_rows = p.r, tile.tap_columns = p.s;
  tile.grad = scratch.grad_table;
  tile.sums = sums, tile.sums_pitch = plan.block, tile.channels = channels;
  const int64_t q = p.q();
  point_at_window(image, static_cast<const X*>(scratch.zeros), begin * p.stride.h - p.padding.top, plan.x_rows,
                  -p.padding.left, plan.width, x_table);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < q; j += kTileColumns) {
      for (int64_t column = 0; column < kTileColumns; ++column)
        scratch.grad_table[column] =
            j + column < q ? grad + (i * q + j + column) * p.k : static_cast<const T*>(scratch.zeros);
      tile.x = x_table + (i - begin) * p.stride.h * plan.width + j * p.stride.w;
      add(tile);
    }
}

/// One share of one image, one block of channels. Shares are numbered before images, blocks before shares.
template <class T>
void add_share(const ConvProblem& p, const ChannelGradPlan& plan, const T* grad_y, const T* x, int64_t task,
               acc_t<T>* sums, const ChannelGradScratch<T>& scratch) {
  const int64_t c = task % plan.blocks * plan.block, channels = min_of(plan.block, p.k - c);
  const int64_t n = task / plan.blocks / plan.shares, multiplier = p.k_per_group();
  const int64_t begin = task / plan.blocks % plan.shares * plan.rows, end = min_of(p.p(), begin + plan.rows);
  const T* grad = grad_y + n * p.p() * p.q() * p.k + c;
  const ChannelImage<T> image{x + n * p.h * p.w * p.c + c, {p.h, p.w}, p.c};
  if (multiplier == 1) return add_grad_rows<T, T>(p, plan, image, grad, begin, end, channels, sums, scratch);
  const int64_t first = min_of(max_of(0, begin * p.stride.h - p.padding.top), p.h);
  const int64_t past = (end - 1) * p.stride.h - p.padding.top + (p.r - 1) * p.dilation.h + 1;
  repeat_channels(image, first, max_of(first, min_of(p.h, past)), multiplier, scratch.repeated);
  const ChannelImage<acc_t<T>> wide{scratch.repeated - first * p.w * p.k, {p.h, p.w}, p.k};
  add_grad_rows<acc_t<T>, T>(p, plan, wide, grad, begin, end, channels, sums, scratch);
}

template <class T>
void weight_grad_channel_lanes(const ConvProblem& p, const T* grad_y, const T* x, T* grad_weight) {
  using Acc = acc_t<T>;
  constexpr int64_t kBytes = sizeof(Acc), kPointerBytes = sizeof(void*);
  const ChannelGradPlan plan(p, simd::kLanes<Acc>);
  const int64_t taps = p.r * p.s, task_elements = taps * plan.block, shares = p.n * plan.shares;
  const int64_t repeated_rows = p.k_per_group() > 1 ? min_of(p.h, plan.x_rows) : 0;
  Scratch partial(shares * plan.blocks * task_elements * kBytes);
  parallel_for(0, shares * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch x_table(plan.x_rows * plan.width * kPointerBytes), grad_table(kTileColumns * kPointerBytes);
    Scratch zeros(plan.block * kBytes), repeated(repeated_rows * p.w * p.k * kBytes);
    std::memset(zeros.as<void>(), 0, static_cast<size_t>(plan.block * kBytes));
    const ChannelGradScratch<T> scratch{x_table.as<const void*>(), grad_table.as<const T*>(), zeros.as<void>(),
                                        repeated.as<Acc>()};
    for (int64_t task = begin; task < end; ++task) {
      Acc* sums = partial.as<Acc>() + task * task_elements;
      std::memset(sums, 0, static_cast<size_t>(task_elements * kBytes));
      add_share<T>(p, plan, grad_y, x, task, sums, scratch);
    }
  });
  for (int64_t k = 0; k < p.k; ++k)
    for (int64_t t = 0; t < taps; ++t) {
      const Acc* sums = partial.as<Acc>() + k / plan.block * task_elements + t * plan.block + k % plan.block;
      Acc total = sums[0];
      for (int64_t share = 1; share < shares; ++share) total += sums[share * plan.blocks * task_elements];
      grad_weight[k * taps + t] = simd::narrow<T>(total);
    }
}

}  // namespace
}  // namespace fastconv
