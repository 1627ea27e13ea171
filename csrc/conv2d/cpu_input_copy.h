// The input as the weight gradient reads it: one element at a time, the same distance apart for every (channel, tap).
//
// The input is copied as padded rows split by stride phase (cpu_padded_rows.h), so that neighbouring outputs read
// neighbouring elements: NCHW channel by channel, NHWC in blocks of kTileRows channels that stay side by side, so that
// the rows of a tile lie together and a pixel is a few bytes from the next. In the tensor it would be C elements away,
// for most C a distance that keeps hitting the same cache sets. An input without padding is read in place, in NHWC if
// there are too few output channels to pay for the copy.
#pragma once

#include "conv2d/cpu_lanes.h"
#include "conv2d/cpu_padded_rows.h"
#include "conv2d/cpu_tile.h"

namespace fastconv {
namespace {

/// Output rows [row, row + row_count) of images [image, image + image_count).
struct ImageRows {
  int64_t image, image_count, row, row_count;
};

class InputCopy {
 public:
  /// `same_type`: the input is stored in the type that sums are kept in; `panels`: how often it will be read.
  InputCopy(const GemmWeightGrad& p, bool same_type, int64_t panels) : rows_(p, 1), nchw_(p.layout == Layout::nchw) {
    const int64_t last_row = (p.i - 1) * p.step.h + rows_.last_row;
    const int64_t last_column = (p.j - 1) * p.step.w + rows_.last_column;
    in_place_ = same_type && (nchw_ || panels <= kFewPanels) && rows_.first_row >= 0 && rows_.first_column >= 0 &&
                last_row < p.h && last_column < p.w;
  }

  void set_chunk(int64_t images, int64_t output_rows) {
    images_ = images;
    rows_.strip_rows = output_rows;
  }

  /// Elements copied per channel and image; in place, those that are read.
  int64_t channel_elems() const { return rows_.channel_elems(); }
  /// Sets the size of a block of channels, rounded up so that it suits the copy; returns it.
  int64_t set_block(const GemmWeightGrad& p, int64_t channels) {
    block_channels_ = min_of(p.c, nchw_ ? channels : round_up(channels, kTileRows));
    return block_channels_;
  }
  int64_t buffer_elems() const {
    return in_place_ ? 0 : images_ * round_up(block_channels_, kTileRows) * channel_elems() + kSlack;
  }

  /// Where pixel d of a chunk is, relative to the first.
  void fill_depth_offsets(const GemmWeightGrad& p, int64_t* offsets) const {
    for (int64_t image = 0; image < images_; ++image)
      for (int64_t i = 0; i < rows_.strip_rows; ++i)
        for (int64_t j = 0; j < p.j; ++j) {
          if (in_place_)
            *offsets++ = image * p.x_strides.n + i * p.step.h * p.x_strides.h + j * p.step.w * p.x_strides.w;
          else if (nchw_) *offsets++ = image * block_channels_ * channel_elems() + i * rows_.pitch + j;
          else *offsets++ = (image * channel_elems() + i * rows_.pitch + j) * kTileRows;
        }
  }

  /// Where weight `row` of a block reads, relative to the pixel: (channel, tap) in NCHW, (tap, channel) in NHWC.
  void fill_row_offsets(const GemmWeightGrad& p, int64_t channels, int64_t* offsets) const {
    for (int64_t row = 0; row < channels * p.tap_count; ++row) {
      const int64_t c = nchw_ ? row / p.tap_count : row % channels;
      const Tap& tap = p.taps[nchw_ ? row % p.tap_count : row / channels];
      if (in_place_) {
        offsets[row] = c * p.x_strides.c + tap.dh * p.x_strides.h + tap.dw * p.x_strides.w;
      } else if (nchw_) {
        offsets[row] = c * rows_.channel_elems() + rows_.tap_offset(p, tap);
      } else {
        offsets[row] =
            (c / kTileRows * images_ * channel_elems() + rows_.tap_offset(p, tap)) * kTileRows + c % kTileRows;
      }
    }
  }

  /// Makes channels [first_channel, first_channel + channels) of a chunk readable; returns where its first pixel is.
  template <class T>
  const acc_t<T>* prepare(const GemmWeightGrad& p, const ImageRows& chunk, int64_t first_channel, int64_t channels,
                          acc_t<T>* buffer) const {
    const T* x = static_cast<const T*>(p.x) + chunk.image * p.x_strides.n + first_channel * p.x_strides.c;
    if (in_place_) return reinterpret_cast<const acc_t<T>*>(x + chunk.row * p.step.h * p.x_strides.h);
    if (!nchw_) {
      copy_channel_blocks<T>(p, chunk, x, channels, buffer);
      return buffer;
    }
    for (int64_t image = 0; image < chunk.image_count; ++image)
      copy_padded_rows<T>(p, rows_, x + image * p.x_strides.n, chunk.row, chunk.row_count, 0, channels,
                          buffer + image * block_channels_ * rows_.channel_elems());
    return buffer;
  }

 private:
  static constexpr int64_t kFewPanels = 4;
  static constexpr int64_t kSlack = 16;  // whole vectors are written: up to a vector beyond the last channel block

  template <class T>
  void copy_channel_blocks(const GemmWeightGrad& p, const ImageRows& chunk, const T* x, int64_t channels,
                           acc_t<T>* buffer) const {
    for (int64_t c = 0; c < channels; c += kTileRows)
      for (int64_t image = 0; image < chunk.image_count; ++image)
        for (int64_t phase = 0; phase < rows_.phases_h * rows_.phases_w; ++phase) {
          acc_t<T>* target =
              buffer + ((c / kTileRows * images_ + image) * channel_elems() + phase * rows_.phase_elems()) * kTileRows;
          const T* source = x + image * p.x_strides.n + c;
          for (int64_t a = 0; a < chunk.row_count + rows_.row_span; ++a, target += rows_.pitch * kTileRows)
            copy_block_row<T>(p, (chunk.row + a) * p.step.h + rows_.first_row + phase / rows_.phases_w,
                              rows_.first_column + phase % rows_.phases_w, source, min_of(kTileRows, channels - c),
                              target);
        }
  }

  /// One row of one phase: input row `row`, from column `first` on.
  template <class T>
  void copy_block_row(const GemmWeightGrad& p, int64_t row, int64_t first, const T* source, int64_t live,
                      acc_t<T>* target) const {
    const int64_t step = p.step.w, width = inside(row, p.h) ? p.w : 0;
    const int64_t begin = min_of(rows_.pitch, first < 0 ? ceil_div(-first, step) : 0);
    const int64_t end = max_of(begin, min_of(rows_.pitch, first < width ? ceil_div(width - first, step) : 0));
    for (int64_t i = 0; i < begin * kTileRows; ++i) target[i] = 0;
    copy_pixels<T>(source + row * p.x_strides.h + (first + begin * step) * p.x_strides.w, step * p.x_strides.w,
                   end - begin, live, target + begin * kTileRows);
    for (int64_t i = end * kTileRows; i < rows_.pitch * kTileRows; ++i) target[i] = 0;
  }

  /// `live` channels of each pixel. Writes whole vectors: the next pixel overwrites what is too much.
  template <class T>
  static void copy_pixels(const T* source, int64_t pixel_stride, int64_t count, int64_t live, acc_t<T>* target) {
    using Acc = acc_t<T>;
    constexpr int64_t kLane = simd::kLanes<Acc>;
    for (int64_t v = 0; v < kTileRows; v += kLane) {
      const LaneRange<Acc> range(0, max_of(0, min_of(kLane, live - v)));
      if (v == 0 && kTileRows <= kLane) {
        for (int64_t i = 0; i < count; ++i)
          simd::store<Acc>(target + i * kTileRows, load_range(source + i * pixel_stride, 1, range));
        return;
      }
      // More than one vector a pixel: only the last may write past its end, so keep to the pixel here.
      for (int64_t i = 0; i < count; ++i)
        store_head<Acc>(target + i * kTileRows + v, 1, load_range(source + i * pixel_stride + v, 1, range),
                        min_of(kLane, kTileRows - v));
    }
  }

  PaddedRows rows_;
  bool nchw_, in_place_;
  int64_t images_ = 1, block_channels_ = 1;
};

}  // namespace
}  // namespace fastconv
