// A tile of the tensor in which the window of every channel can be read without a bounds check.
//
// A tile holds all channels of some pixels, widened to the accumulator's type, with zeros for the channels before the
// first and after the last. Both layouts become the same picture: lines of consecutive elements, and a distance from
// one channel to the next.
//   NCHW: a line is the tile's pixels of one channel; the next channel is the next line.
//   NHWC: a line is the channels of one pixel; the next channel is the next element.
#pragma once

#include "common/parallel.h"
#include "common/simd/simd.h"
#include "norm/norm.h"

namespace fastconv {
namespace {

struct TileShape {
  int64_t pixels;          // of a tile; a multiple of the lanes in NCHW
  int64_t lines, length;   // full lines, and the elements of one
  int64_t line_stride;     // in the tile
  int64_t channel_stride;  // in the tile
  int64_t origin;          // of channel 0 of pixel 0
  int64_t elements;        // to allocate, a vector of slack included

  /// `lead` and `trail` zero channels on the two sides.
  TileShape(const NormProblem& p, int64_t lead, int64_t trail, int64_t lanes, int64_t tile_pixels) {
    pixels = tile_pixels;
    const int64_t padded = p.c + lead + trail;
    if (p.layout == Layout::nchw) {
      lines = p.c, length = pixels, line_stride = pixels, channel_stride = pixels;
    } else {
      lines = pixels, length = p.c, line_stride = padded, channel_stride = 1;
    }
    origin = lead * channel_stride;
    elements = padded * pixels + 2 * lanes;
  }
};

/// Pixels of a tile: enough to fill vectors and hide a line's start, few enough that a handful of tiles fits into L2.
FASTCONV_INLINE int64_t tile_pixels(const NormProblem& p, int64_t lanes) {
  constexpr int64_t kElements = 8192;
  const int64_t fitting = max_of(1, kElements / (p.c + p.size));
  if (p.layout == Layout::nhwc) return min_of(fitting, p.plane);
  return round_up(min_of(max_of(fitting, lanes), p.plane), lanes);
}

/// Pixels [first, first + live) of one image.
struct TilePlace {
  int64_t image, first, live;
};

/// Calls body(place) for each tile of a thread's share.
template <class Body>
FASTCONV_INLINE void for_each_tile(const NormProblem& p, int64_t pixels, int64_t begin, int64_t end, const Body& body) {
  const int64_t per_image = ceil_div(p.plane, pixels);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile % per_image * pixels;
    body(TilePlace{tile / per_image, first, min_of(pixels, p.plane - first)});
  }
}

/// Element index in the tensor of the start of a line, and how long the line is and how many there are at this place.
struct TileLines {
  int64_t start, stride, count, length;

  TileLines(const NormProblem& p, const TilePlace& place) {
    if (p.layout == Layout::nchw) {
      start = place.image * p.c * p.plane + place.first, stride = p.plane, count = p.c, length = place.live;
    } else {
      start = (place.image * p.plane + place.first) * p.c, stride = p.c, count = place.live, length = p.c;
    }
  }
};

/// A buffer for one tile. Its margins are zero from the beginning, and filling it does not touch them.
template <class Acc>
class Tile {
 public:
  explicit Tile(const TileShape& shape) : shape_(shape), buffer_(shape.elements * static_cast<int64_t>(sizeof(Acc))) {
    for (int64_t i = 0; i < shape.elements; ++i) buffer_.template as<Acc>()[i] = 0;
  }

  FASTCONV_INLINE Acc* line(int64_t index) const {
    return buffer_.template as<Acc>() + shape_.origin + index * shape_.line_stride;
  }

  template <class T>
  void fill(const TileLines& lines, const T* source) const {
    constexpr int64_t kLane = simd::kLanes<Acc>;
    for (int64_t i = 0; i < lines.count; ++i) {
      const T* from = source + lines.start + i * lines.stride;
      Acc* to = line(i);
      int64_t j = 0;
      for (; j + kLane <= lines.length; j += kLane) simd::store<Acc>(to + j, simd::load(from + j));
      for (; j < lines.length; ++j) to[j] = simd::widen(from[j]);
    }
  }

 private:
  TileShape shape_;
  Scratch buffer_;
};

}  // namespace
}  // namespace fastconv
