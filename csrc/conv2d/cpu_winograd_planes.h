// Winograd's inputs and outputs in NCHW, by way of small copies with the channels in lanes.
//
// A run of tiles takes kLanes channels at a time: the pixels that it reads are transposed into a strip in L1,
// [row][column][kLanes], with zeros where the plane ends; its outputs go through one, and are transposed back.
#pragma once

#include "conv2d/cpu_lanes.h"
#include "conv2d/cpu_transpose.h"
#include "conv2d/cpu_winograd_plan.h"
#include "conv2d/cpu_winograd_transforms.h"

namespace fastconv {
namespace {

/// Elements of a strip, and of the outputs of a run: squares write whole vectors of pixels.
template <class Form>
int64_t strip_elems(const WinogradPlan& plan) {
  const int64_t longest = min_of(plan.block_tiles, plan.columns) * Form::kOutputs + 2;
  return (Form::kInputs * longest + simd::kLanes<float>)*simd::kLanes<float>;
}

/// Rows of the input from row h and column w on, of `channels` channels: [kInputs][pitch][kLanes].
template <class Form, class T>
void copy_strip(const GemmConv& p, const T* planes, int64_t channels, int64_t h, int64_t w, int64_t pitch,
                float* strip) {
  constexpr int64_t kLane = simd::kLanes<float>;
  const int64_t begin = min_of(pitch, max_of(0, -w)), end = max_of(begin, min_of(pitch, p.w - w));
  const auto clear = [](float* row, int64_t from, int64_t to) {
    for (int64_t pixel = from; pixel < to; ++pixel) simd::store<float>(row + pixel * kLane, simd::zero<float>());
  };
  // What a square writes beyond the end of a row is written over: rows come in order.
  for (int64_t r = 0; r < Form::kInputs; ++r, strip += pitch * kLane) {
    const bool reads = inside(h + r, p.h);
    clear(strip, 0, reads ? begin : pitch);
    if (!reads) continue;
    for (int64_t column = begin; column < end; column += kLane) {
      const int64_t place = (h + r) * p.w + w + column;
      transpose_part<T>(planes + place, p.x_strides.c, channels, min_of(kLane, end - column),
                        place + kLane <= p.h * p.w, strip + column * kLane, kLane);
    }
    clear(strip, end, pitch);
  }
}

/// V[product][tile][pitch of c] of a block.
template <class Form, class T>
void transform_block_nchw(const GemmConv& p, const WinogradPlan& plan, int64_t first, int64_t count, float* strip,
                          float* v) {
  constexpr int64_t kLane = simd::kLanes<float>, kInputs = Form::kInputs;
  plan.for_runs(first, count, [&](const TileRun& run) {
    const int64_t pitch = run.count * Form::kOutputs + 2;
    const T* image = static_cast<const T*>(p.x) + run.first.image * p.x_strides.n;
    for (int64_t c = 0; c < p.c; c += kLane) {
      copy_strip<Form, T>(p, image + c * p.x_strides.c, min_of(kLane, p.c - c),
                          run.first.row * Form::kOutputs + plan.first_h,
                          run.first.column * Form::kOutputs + plan.first_w, pitch, strip);
      for (int64_t tile = 0; tile < run.count; ++tile) {
        simd::Vec<float> d[Form::kProducts], result[Form::kProducts];
        const float* from = strip + tile * Form::kOutputs * kLane;
#pragma GCC unroll 6
        for (int64_t r = 0; r < kInputs; ++r)
#pragma GCC unroll 6
          for (int64_t s = 0; s < kInputs; ++s) d[r * kInputs + s] = simd::load(from + (r * pitch + s) * kLane);
        Form::transform_input(d, result);
        float* to = v + (run.lane + tile) * plan.pitch + c;
#pragma GCC unroll 36
        for (int64_t f = 0; f < Form::kProducts; ++f) simd::store<float>(to + f * plan.v_step, result[f]);
      }
    }
  });
}

/// `count` neighbouring pixels' sums, [pixel][kLanes] with scale and shift applied, to their planes from `offset` on.
template <class T>
void planes_from_pixels(const GemmConv& p, const float* sums, int64_t offset, int64_t channels, int64_t count) {
  constexpr int64_t kLane = simd::kLanes<float>;
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  for (int64_t pixel = 0; pixel < count; pixel += kLane, sums += kLane * kLane) {
    const int64_t live = min_of(kLane, count - pixel);
    T* y = static_cast<T*>(p.y) + offset + pixel;
    if constexpr (__is_same(T, float))
      if (live == kLane && channels == kLane && residual == nullptr) {
        transpose_square<float>(sums, kLane, y, p.y_strides.c);
        continue;
      }
    alignas(64) float square[kLane * kLane];
    transpose_square<float>(sums, kLane, square, kLane);
    for (int64_t c = 0; c < channels; ++c, y += p.y_strides.c) {
      auto value = simd::load(square + c * kLane);
      if (residual) {
        const T* other = residual + (y - static_cast<T*>(p.y));
        value = value + (live == kLane ? simd::load(other) : simd::load_first(other, live));
        value = simd::activate<float>(value, p.epilogue.activation);
      }
      if (live == kLane) simd::store<T>(y, value);
      else store_head<T>(y, 1, value, live);
    }
  }
}

/// The outputs of a run for up to kLanes channels from M[product][block_tiles][kTileColumns].
template <class Form, class T>
void finish_run_nchw(const GemmConv& p, const WinogradPlan& plan, const TileRun& run, int64_t channel, int64_t channels,
                     const float* m, float* sums) {
  constexpr int64_t kLane = simd::kLanes<float>, kOutputs = Form::kOutputs;
  const int64_t i = run.first.row * kOutputs, j = run.first.column * kOutputs;
  const int64_t rows = min_of(kOutputs, p.i - i), pitch = min_of(kOutputs * run.count, p.j - j);
  const Epilogue& e = p.epilogue;
  const auto per_channel = [&](const void* values, float otherwise) {
    return values ? simd::load_first(static_cast<const float*>(values) + channel, channels)
                  : simd::broadcast(otherwise);
  };
  const auto scale = per_channel(e.scale, 1), shift = per_channel(e.shift, 0);
  for (int64_t tile = 0; tile < run.count; ++tile) {
    simd::Vec<float> products[Form::kProducts], outputs[kOutputs * kOutputs];
#pragma GCC unroll 36
    for (int64_t f = 0; f < Form::kProducts; ++f)
      products[f] = simd::load(m + (f * plan.block_tiles + run.lane + tile) * kTileColumns<float>);
    Form::transform_output(products, outputs);
    for (auto& value : outputs) {
      if (e.scale) value = value * scale;
      if (e.shift) value = value + shift;
      if (e.residual == nullptr) value = simd::activate<float>(value, e.activation);
    }
    const int64_t live = min_of(kOutputs, pitch - tile * kOutputs);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < live; ++s)
        simd::store<float>(sums + (r * pitch + tile * kOutputs + s) * kLane, outputs[r * kOutputs + s]);
  }
  // Rows as wide as the plane follow one another there too.
  const int64_t lines = pitch == p.j ? 1 : rows, length = rows * pitch / lines;
  const int64_t offset = p.y_offset + run.first.image * p.y_strides.n + channel * p.y_strides.c;
  for (int64_t line = 0; line < lines; ++line)
    planes_from_pixels<T>(p, sums + line * length * kLane, offset + (i + line) * p.y_strides.h + j, channels, length);
}

}  // namespace
}  // namespace fastconv
