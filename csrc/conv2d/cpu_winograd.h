// Winograd's F(4x4, 3x3) for stride 1: 36 products give 16 outputs, where the definition takes 144.
//
// Filters are transformed before the tasks start. A task owns a block of tiles (4x4 outputs each): it transforms their
// 6x6 inputs for all input channels into V[product][tile][c], which stays in L2, then for each panel of output channels
// runs the 36 small products into M, which stays in L1 or L2, and turns M into outputs, epilogue included.
// Nothing but inputs, filters and outputs goes through memory.
//
// Lanes are output channels and rows of the register tile are tiles, in either layout; NCHW is transposed on the way in
// and out, a few rows at a time (cpu_winograd_planes.h).
#pragma once

#include "conv2d/cpu_channel_lanes.h"
#include "conv2d/cpu_winograd_filters.h"
#include "conv2d/cpu_winograd_planes.h"

namespace fastconv {
namespace {

/// Input channels that one chain of sums takes. Longer chains cost accuracy: with 256 channels in one the error was
/// three times as large.
inline constexpr int64_t kWinogradDepth = 64;

/// A product of `depth` steps as the sum of products of at most kWinogradDepth.
FASTCONV_INLINE void multiply_in_blocks(TileCall<float> call, TileFunction<float> multiply, int64_t depth) {
  const int64_t blocks = ceil_div(depth, kWinogradDepth), length = ceil_div(depth, max_of(blocks, 1));
  for (int64_t begin = 0; begin == 0 || begin < depth; begin += length) {
    call.depth = min_of(length, depth - begin), call.accumulate = begin > 0;
    multiply(call);
    call.a += length, call.b += length * kTileColumns<float>;
  }
}

/// V[product][tile][pitch of c] of a block.
template <class Form, class T>
void transform_block_nhwc(const GemmConv& p, const WinogradPlan& plan, int64_t first, int64_t count, float* v) {
  constexpr int64_t kLane = simd::kLanes<float>, kInputs = Form::kInputs;
  for (int64_t tile = 0; tile < count; ++tile) {
    const TilePlace place = plan.place(first + tile);
    const T* image = static_cast<const T*>(p.x) + place.image * p.x_strides.n;
    const int64_t h = place.row * Form::kOutputs + plan.first_h, w = place.column * Form::kOutputs + plan.first_w;
    const T* pixels[Form::kProducts];
    for (int64_t f = 0; f < Form::kProducts; ++f) {
      const int64_t y = h + f / kInputs, x = w + f % kInputs;
      pixels[f] = inside(y, p.h) && inside(x, p.w) ? image + y * p.x_strides.h + x * p.x_strides.w : nullptr;
    }
    for (int64_t c = 0; c < p.c; c += kLane) {
      const int64_t live = min_of(kLane, p.c - c);
      simd::Vec<float> d[Form::kProducts], result[Form::kProducts];
      for (int64_t f = 0; f < Form::kProducts; ++f)
        d[f] = pixels[f] == nullptr ? simd::zero<float>()
               : live == kLane      ? simd::load(pixels[f] + c)
                                    : simd::load_first(pixels[f] + c, live);
      Form::transform_input(d, result);
      float* to = v + tile * plan.pitch + c;
#pragma GCC unroll 36
      for (int64_t f = 0; f < Form::kProducts; ++f) simd::store<float>(to + f * plan.v_step, result[f]);
    }
  }
}

/// The outputs of one tile for `columns` channels from M[product][block_tiles][kTileColumns].
template <class Form, class T>
void finish_tile_nhwc(const GemmConv& p, const WinogradPlan& plan, int64_t tile, int64_t channel, int64_t columns,
                      const float* m) {
  constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>, kOutputs = Form::kOutputs;
  const TilePlace place = plan.place(tile);
  const int64_t i = place.row * kOutputs, j = place.column * kOutputs;
  const int64_t rows = min_of(kOutputs, p.i - i), pixels = min_of(kOutputs, p.j - j);
  alignas(64) float sums[kOutputs * kOutputs * kColumns];  // of the pixels inside the output, side by side
  int64_t offsets[kOutputs * kOutputs];
  for (int64_t lane = 0; lane < columns; lane += kLane) {
    simd::Vec<float> products[Form::kProducts], outputs[kOutputs * kOutputs];
#pragma GCC unroll 36
    for (int64_t f = 0; f < Form::kProducts; ++f) products[f] = simd::load(m + f * plan.block_tiles * kColumns + lane);
    Form::transform_output(products, outputs);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < pixels; ++s)
        simd::store<float>(sums + (r * pixels + s) * kColumns + lane, outputs[r * kOutputs + s]);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = 0; s < pixels; ++s)
      offsets[r * pixels + s] =
          p.y_offset + place.image * p.y_strides.n + (i + r) * p.y_strides.h + (j + s) * p.y_strides.w;
  store_channel_tile<T>(p, offsets, sums, kColumns, channel, rows * pixels, columns);
}

/// Where a task keeps what it works on; `pixels` in NCHW only.
struct WinogradScratch {
  float *v, *m, *pixels;
};

template <class Form, class T>
void convolve_block(const GemmConv& p, const WinogradPlan& plan, const float* filters, int64_t block,
                    int64_t channel_begin, int64_t channel_end, const WinogradScratch& scratch) {
  constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>;
  const int64_t first = block * plan.block_tiles, count = min_of(plan.block_tiles, plan.tiles - first);
  const bool nchw = scratch.pixels != nullptr;
  if (nchw) transform_block_nchw<Form, T>(p, plan, first, count, scratch.pixels, scratch.v);
  else transform_block_nhwc<Form, T>(p, plan, first, count, scratch.v);
  const RowTiles rows(count);
  for (int64_t channel = channel_begin; channel < channel_end; channel += kColumns) {
    const int64_t columns = min_of(kColumns, channel_end - channel);
    for (int64_t f = 0; f < Form::kProducts; ++f)
      for (int64_t tile = 0; tile < rows.tiles; ++tile) {
        TileCall<float> call{};
        call.a = scratch.v + f * plan.v_step + rows.begin(tile) * plan.pitch, call.a_stride = plan.pitch;
        call.b = filters + (channel / kColumns * Form::kProducts + f) * plan.filter_step;
        call.out = scratch.m + (f * plan.block_tiles + rows.begin(tile)) * kColumns, call.out_stride = kColumns;
        const auto multiply =
            kTiles<float, Rows::depth_contiguous>.at(rows.begin(tile + 1) - rows.begin(tile), columns);
        multiply_in_blocks(call, multiply, p.c);
      }
    if (nchw)
      plan.for_runs(first, count, [&](const TileRun& run) {
        for (int64_t lane = 0; lane < columns; lane += kLane)
          finish_run_nchw<Form, T>(p, plan, run, channel + lane, min_of(kLane, columns - lane), scratch.m + lane,
                                   scratch.pixels);
      });
    else
      for (int64_t tile = 0; tile < count; ++tile)
        finish_tile_nhwc<Form, T>(p, plan, first + tile, channel, columns, scratch.m + tile * kColumns);
  }
}

template <class Form, class T>
void convolve_winograd(const GemmConv& p, Layout layout, const float* filters) {
  constexpr int64_t kFloat = sizeof(float);
  const WinogradPlan plan(p, Form::kOutputs);
  parallel_for(0, plan.parts * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch v(plan.products * plan.v_step * kFloat);
    const Scratch m(plan.products * plan.block_tiles * kTileColumns<float> * kFloat);
    const Scratch pixels(layout == Layout::nchw ? strip_elems<Form>(plan) * kFloat : 0);
    const WinogradScratch scratch{v.as<float>(), m.as<float>(), layout == Layout::nchw ? pixels.as<float>() : nullptr};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / plan.blocks * plan.channels_per_part;
      convolve_block<Form, T>(p, plan, filters, task % plan.blocks, channel,
                              min_of(p.m, channel + plan.channels_per_part), scratch);
    }
  });
}

}  // namespace
}  // namespace fastconv
