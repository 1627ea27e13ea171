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

template <class X, class T, int kTapRows, int kTapColumns, int kStep>
void add_window_tile(const GradTile<X, T>& tile) {
  using Acc = acc_t<T>;
  using V = simd::Vec<Acc>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  constexpr int kWidth = (kTileColumns - 1) * kStep + kTapColumns;
  for (int64_t c = 0; c < tile.channels; c += kLane) {
    V factors[kTileColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) factors[j] = simd::load(tile.grad[j] + c);
#pragma GCC unroll 8
    for (int r = 0; r < kTapRows; ++r) {
      V sums[kTapColumns];
      Acc* kept = tile.sums + r * kTapColumns * tile.sums_pitch + c;
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) sums[s] = simd::load(kept + s * tile.sums_pitch);
#pragma GCC unroll 32
      for (int e = 0; e < kWidth; ++e) {
        const V value = simd::load(tile.x[r * kWidth + e] + c);
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
  if (channels % simd::kLanes<acc_t<T>> == 0 && p.r == 3 && p.s == 3 && p.dilation.w == 1) {
    if (p.stride.w == 1) return &add_window_tile<X, T, 3, 3, 1>;
    if (p.stride.w == 2) return &add_window_tile<X, T, 3, 3, 2>;
  }
  return &add_any_window_tile<X, T>;
}

struct ChannelGradPlan {
  int64_t block, blocks, sums_pitch;  // channels
  int64_t rows, shares;               // of grad_y, over all images
  int64_t width;                      // of the pointer table

  ChannelGradPlan(const ConvProblem& p, int64_t lanes) {
    constexpr int64_t kBlock = 64, kTasks = 16;  // 64 channels of 9 sums are 2.3 KiB
    // With a multiplier, channels are repeated for a whole row of x at once, so one block takes them all.
    blocks = p.k_per_group() > 1 ? 1 : ceil_div(p.k, kBlock);
    block = round_up(ceil_div(p.k, blocks), lanes);
    blocks = ceil_div(p.k, block);
    sums_pitch = round_up(block, lanes);
    rows = p.n * p.p();
    shares = max_of(1, min_of(ceil_div(kTasks, blocks), rows / 4));
    width = (kTileColumns - 1) * p.stride.w + (p.s - 1) * p.dilation.w + 1;
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

/// Adds one row of grad_y for the channels [c, c + channels).
template <class X, class T>
void add_grad_row(const ConvProblem& p, const ChannelGradPlan& plan, const ChannelImage<X>& image, const T* grad_row,
                  int64_t i, int64_t channels, acc_t<T>* sums, const ChannelGradScratch<T>& scratch) {
  const X** x_table = reinterpret_cast<const X**>(scratch.x_table);
  const GradTile<X, T> tile{x_table, plan.width,         p.stride.w, p.dilation.w,    p.r,
                            p.s,     scratch.grad_table, sums,       plan.sums_pitch, channels};
  const AddTile<X, T> add = add_tile_kernel<X, T>(p, channels);
  for (int64_t j = 0; j < p.q(); j += kTileColumns) {
    point_at_window(image, static_cast<const X*>(scratch.zeros), i * p.stride.h - p.padding.top, p.dilation.h, p.r,
                    j * p.stride.w - p.padding.left, plan.width, x_table);
    for (int64_t column = 0; column < kTileColumns; ++column)
      scratch.grad_table[column] =
          j + column < p.q() ? grad_row + (j + column) * p.k : static_cast<const T*>(scratch.zeros);
    add(tile);
  }
}

/// Rows of one share, one block of channels.
template <class T>
void add_share(const ConvProblem& p, const ChannelGradPlan& plan, const T* grad_y, const T* x, int64_t share,
               int64_t block, acc_t<T>* sums, const ChannelGradScratch<T>& scratch) {
  const int64_t c = block * plan.block, channels = min_of(plan.block, p.k - c), multiplier = p.k_per_group();
  for (int64_t row = plan.rows * share / plan.shares; row < plan.rows * (share + 1) / plan.shares; ++row) {
    const int64_t n = row / p.p(), i = row % p.p();
    const T* grad_row = grad_y + row * p.q() * p.k + c;
    const ChannelImage<T> image{x + n * p.h * p.w * p.c + c, {p.h, p.w}, p.c};
    if (multiplier == 1) {
      add_grad_row<T, T>(p, plan, image, grad_row, i, channels, sums, scratch);
      continue;
    }
    const int64_t first = min_of(max_of(0, i * p.stride.h - p.padding.top), p.h);
    const int64_t last = max_of(first, min_of(p.h, i * p.stride.h - p.padding.top + (p.r - 1) * p.dilation.h + 1));
    repeat_channels(image, first, last, multiplier, scratch.repeated);
    const ChannelImage<acc_t<T>> wide{scratch.repeated - first * p.w * p.k, {p.h, p.w}, p.k};
    add_grad_row<acc_t<T>, T>(p, plan, wide, grad_row, i, channels, sums, scratch);
  }
}

template <class T>
void weight_grad_channel_lanes(const ConvProblem& p, const T* grad_y, const T* x, T* grad_weight) {
  using Acc = acc_t<T>;
  constexpr int64_t kBytes = sizeof(Acc), kPointerBytes = sizeof(void*);
  const ChannelGradPlan plan(p, simd::kLanes<Acc>);
  const int64_t taps = p.r * p.s, task_elements = taps * plan.sums_pitch;
  const int64_t repeated_rows = p.k_per_group() > 1 ? min_of(p.h, (p.r - 1) * p.dilation.h + 1) : 0;
  Scratch partial(plan.shares * plan.blocks * task_elements * kBytes);
  parallel_for(0, plan.shares * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch x_table(p.r * plan.width * kPointerBytes), grad_table(kTileColumns * kPointerBytes);
    Scratch zeros(plan.sums_pitch * kBytes), repeated(repeated_rows * p.w * p.k * kBytes);
    std::memset(zeros.as<void>(), 0, static_cast<size_t>(plan.sums_pitch * kBytes));
    const ChannelGradScratch<T> scratch{x_table.as<const void*>(), grad_table.as<const T*>(), zeros.as<void>(),
                                        repeated.as<Acc>()};
    for (int64_t task = begin; task < end; ++task) {
      Acc* sums = partial.as<Acc>() + task * task_elements;
      std::memset(sums, 0, static_cast<size_t>(task_elements * kBytes));
      add_share<T>(p, plan, grad_y, x, task / plan.blocks, task % plan.blocks, sums, scratch);
    }
  });
  for (int64_t k = 0; k < p.k; ++k)
    for (int64_t t = 0; t < taps; ++t) {
      const Acc* sums = partial.as<Acc>() + k / plan.block * task_elements + t * plan.sums_pitch + k % plan.block;
      Acc total = sums[0];
      for (int64_t share = 1; share < plan.shares; ++share) total += sums[share * plan.blocks * task_elements];
      grad_weight[k * taps + t] = simd::narrow<T>(total);
    }
}

}  // namespace
}  // namespace fastconv
