// From sums to output where pixels are in lanes: the epilogue, and the places that a panel's pixels have in memory.
#pragma once

#include "conv2d/cpu_lanes.h"
#include "conv2d/cpu_pack.h"

namespace fastconv {
namespace {

/// One output channel's epilogue, ready for vectors of its pixels.
template <class Acc>
class ChannelEpilogue {
 public:
  ChannelEpilogue(const Epilogue& e, int64_t channel)
      : scaled_(e.scale != nullptr),
        shifted_(e.shift != nullptr),
        scale_(simd::broadcast(scaled_ ? static_cast<const Acc*>(e.scale)[channel] : Acc(1))),
        shift_(simd::broadcast(shifted_ ? static_cast<const Acc*>(e.shift)[channel] : Acc(0))),
        activation_(e.activation) {}

  FASTCONV_INLINE simd::Vec<Acc> apply(simd::Vec<Acc> value) const {
    if (scaled_) value = value * scale_;
    return shifted_ ? value + shift_ : value;
  }
  FASTCONV_INLINE simd::Vec<Acc> activate(simd::Vec<Acc> value) const {
    return simd::activate<Acc>(value, activation_);
  }

 private:
  bool scaled_, shifted_;
  simd::Vec<Acc> scale_, shift_;
  Activation activation_;
};

/// The epilogue on a tile that lies in the output: `y` is channel `channel`, first pixel; `columns` are whole vectors.
template <class Acc>
void finish_in_place(const GemmConv& p, Acc* y, int64_t channel, int64_t rows, int64_t columns) {
  if (p.epilogue.is_plain()) return;
  const Acc* residual = static_cast<const Acc*>(p.epilogue.residual);
  if (residual) residual += y - static_cast<const Acc*>(p.y);
  for (int64_t row = 0; row < rows; ++row) {
    const ChannelEpilogue<Acc> epilogue(p.epilogue, channel + row);
    for (int64_t lane = 0; lane < columns; lane += simd::kLanes<Acc>) {
      const int64_t offset = row * p.y_strides.c + lane;
      auto value = epilogue.apply(simd::load(y + offset));
      if (residual) value = value + simd::load(residual + offset);
      simd::store<Acc>(y + offset, epilogue.activate(value));
    }
  }
}

/// Applies the epilogue to `count` neighbouring columns of a tile of sums and writes them; `y_offset` is the first
/// one's in channel 0. Reads whole vectors of the tile.
template <class T>
void store_run(const GemmConv& p, const acc_t<T>* tile, int64_t y_offset, int64_t channel, int64_t rows,
               int64_t count) {
  using Acc = acc_t<T>;
  constexpr int kLane = simd::kLanes<Acc>;
  const int64_t step = p.y_strides.w;
  for (int64_t row = 0; row < rows; ++row) {
    const ChannelEpilogue<Acc> epilogue(p.epilogue, channel + row);
    for (int64_t i = 0; i < count; i += kLane) {
      const int64_t live = min_of(kLane, count - i);
      const int64_t offset = (channel + row) * p.y_strides.c + y_offset + i * step;
      auto value = epilogue.apply(simd::load(tile + row * kTileColumns<Acc> + i));
      if (p.epilogue.residual)
        value = value + load_range(static_cast<const T*>(p.epilogue.residual) + offset, step, LaneRange<Acc>(0, live));
      value = epilogue.activate(value);
      T* y = static_cast<T*>(p.y) + offset;
      if (step == 1 && live == kLane) simd::store<T>(y, value);
      else store_head<T>(y, step, value, live);
    }
  }
}

template <class T>
void store_pixel_tile(const GemmConv& p, const PanelPixels<acc_t<T>>& pixels, const acc_t<T>* tile, int64_t channel,
                      int64_t rows) {
  for (int64_t r = 0; r < pixels.run_count; ++r)
    store_run<T>(p, tile + pixels.runs[r].lane, pixels.runs[r].y_offset, channel, rows, pixels.runs[r].length);
}

}  // namespace
}  // namespace fastconv
