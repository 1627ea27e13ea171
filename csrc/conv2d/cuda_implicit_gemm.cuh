// A convolution and its gradients as matrix products whose operands are read where they lie.
//
// Three tensors meet in every pass: an `image`, over which windows slide; a `grid`, which has one pixel for each
// window; and the weight. Two of them are multiplied and give the third, a product for each group:
//
//   pass             image   grid   product, a sum over
//   forward          x       y      taps:    grid[pixel, channel]  = image[pixel, tap]    * weight[channel, tap]
//   input gradient   dy      dx     the same, once for each phase of dx, with the taps that reach it
//   weight gradient  x       dy     pixels:  weight[channel, tap]  = grid[pixel, channel] * image[pixel, tap]
//
// A tap is a place in the window and a channel of the image. So every matrix has a pixel, a channel of the grid or a
// tap along each side, and every element of every tensor is found by adding what its two indices contribute: two
// Places.
#pragma once

#include "conv2d/candidates.h"
#include "cuda_support/cuda.h"
#include "cuda_support/describe.h"

namespace fastconv::cuda {

/// What one index of an element contributes: an offset, and for images the rows and columns of the window, one bit
/// each, that lie inside the image (a pixel's) or that are meant (a tap's). An element exists if the bits of its two
/// indices meet. An index past the end has no bits.
struct alignas(16) Place {
  int64_t offset;
  uint32_t rows, columns;
};
inline constexpr uint32_t kEverywhere = ~0u;
inline constexpr int64_t kLargestWindow = 32;  // bits

__device__ __forceinline__ bool meet(const Place& a, const Place& b) {
  return (a.rows & b.rows) != 0 && (a.columns & b.columns) != 0;
}

/// Windows along one axis. Tap t at grid position i reads element i * stride + start + t * reach of the image, has the
/// weight of tap first + t * every, and belongs to element place + i * step of the grid tensor.
struct WindowAxis {
  int positions, size;  // of the grid and of the image
  int taps, stride, start, reach, first, every, place, step;

  /// The taps that are inside the image.
  __device__ __forceinline__ uint32_t inside(int position) const {
    uint32_t bits = 0;
    int at = position * stride + start;
    for (int t = 0; t < taps; ++t, at += reach)
      if (at >= 0 && at < size) bits |= 1u << t;
    return bits;
  }
};

struct Windows {
  WindowAxis h, w;
};

/// Everything about a product but the addresses of its tensors; a kernel's parameter.
struct ImplicitGemm {
  ConvProblem p;
  int64_t outputs_h, outputs_w;
  Strides4 image, grid;
  int64_t weight_grid_channel, weight_image_channel, weight_h, weight_w;
  uint32_t images, image_channels, grid_channels;  // channels of one group
  uint32_t groups, phases_h, phases_w;

  std::string describe() const { return cuda::describe(p); }
  int64_t image_group() const { return image_channels * image.c; }
  int64_t grid_group() const { return grid_channels * grid.c; }
  int64_t weight_group() const { return p.k_per_group() * p.weight_strides().n; }
};

inline ImplicitGemm implicit_gemm(const ConvProblem& p, ConvPass pass) {
  const Strides4 weight = p.weight_strides();
  ImplicitGemm g{};
  g.p = p, g.outputs_h = p.p(), g.outputs_w = p.q();
  g.image = p.input_strides(), g.grid = p.output_strides();
  g.weight_grid_channel = weight.n, g.weight_image_channel = weight.c;
  g.weight_h = weight.h, g.weight_w = weight.w;
  g.images = static_cast<uint32_t>(p.n), g.groups = static_cast<uint32_t>(p.groups);
  g.image_channels = static_cast<uint32_t>(p.c_per_group());
  g.grid_channels = static_cast<uint32_t>(p.k_per_group());
  g.phases_h = g.phases_w = 1;
  if (pass == ConvPass::input_grad) {
    g.image = p.output_strides(), g.grid = p.input_strides();
    g.weight_grid_channel = weight.c, g.weight_image_channel = weight.n;
    g.image_channels = static_cast<uint32_t>(p.k_per_group());
    g.grid_channels = static_cast<uint32_t>(p.c_per_group());
    g.phases_h = static_cast<uint32_t>(min_of(p.stride.h, p.h));
    g.phases_w = static_cast<uint32_t>(min_of(p.stride.w, p.w));
  }
  return g;
}

__device__ __forceinline__ WindowAxis forward_axis(int64_t size, int64_t outputs, int64_t padding, int64_t taps,
                                                   int64_t dilation, int64_t stride) {
  return {static_cast<int>(outputs),
          static_cast<int>(size),
          static_cast<int>(taps),
          static_cast<int>(stride),
          -static_cast<int>(padding),
          static_cast<int>(dilation),
          0,
          1,
          0,
          1};
}

/// Inputs h = phase + i * stride, seen as a grid that slides over the outputs. Tap r reaches them if
/// (h + padding - r * dilation) is a multiple of the stride; that is so for every r in an arithmetic sequence, and the
/// quotient is the output. No tap may do: then there is nothing to add, and zeros are written.
__device__ __forceinline__ WindowAxis input_grad_axis(int64_t size, int64_t outputs, int64_t padding, int64_t taps,
                                                      int64_t dilation, int64_t stride, int phase) {
  // 32 bits suffice for spans of fewer than 2^31 pixels, and one thread does this while its block waits.
  const int by = static_cast<int>(stride), apart = static_cast<int>(dilation);
  const int origin = phase + static_cast<int>(padding);
  int found = 0, first = 0, every = 1;
  for (int r = 0; r < static_cast<int>(taps); ++r) {
    if ((origin - r * apart) % by != 0) continue;
    if (found == 0) first = r;
    if (found == 1) every = r - first;
    ++found;
  }
  const int start = found > 0 ? (origin - first * apart) / by : 0;
  return {(static_cast<int>(size) - phase - 1) / by + 1,
          static_cast<int>(outputs),
          found,
          1,
          start,
          -(every * apart / by),
          first,
          every,
          phase,
          by};
}

template <ConvPass kPass>
__device__ __forceinline__ Windows windows_of(const ImplicitGemm& g, uint32_t phase) {
  const ConvProblem& p = g.p;
  if constexpr (kPass == ConvPass::input_grad)
    return {input_grad_axis(p.h, g.outputs_h, p.padding.top, p.r, p.dilation.h, p.stride.h,
                            static_cast<int>(phase / g.phases_w)),
            input_grad_axis(p.w, g.outputs_w, p.padding.left, p.s, p.dilation.w, p.stride.w,
                            static_cast<int>(phase % g.phases_w))};
  else
    return {forward_axis(p.h, g.outputs_h, p.padding.top, p.r, p.dilation.h, p.stride.h),
            forward_axis(p.w, g.outputs_w, p.padding.left, p.s, p.dilation.w, p.stride.w)};
}

enum class GemmTensor { image, weight, grid };
enum class GemmAxis { pixels, channels, taps };

template <GemmAxis kAxis>
__device__ __forceinline__ uint32_t extent(const ImplicitGemm& g, const Windows& windows) {
  if constexpr (kAxis == GemmAxis::channels) return g.grid_channels;
  else if constexpr (kAxis == GemmAxis::pixels)
    return g.images * static_cast<uint32_t>(windows.h.positions) * static_cast<uint32_t>(windows.w.positions);
  else return g.image_channels * static_cast<uint32_t>(windows.h.taps * windows.w.taps);
}

/// Where an index lies in a tensor. Taps are numbered as the weight lies in memory: the channel last in NHWC, first in
/// NCHW. The divisions cost 20 instructions each, but few indices are looked up: kernels keep them in tables.
template <GemmTensor kTensor, GemmAxis kAxis, Layout kLayout>
__device__ __forceinline__ Place place_of(const ImplicitGemm& g, const Windows& windows, uint32_t index) {
  const WindowAxis &h = windows.h, &w = windows.w;
  if (index >= extent<kAxis>(g, windows)) return {0, 0, 0};
  if constexpr (kAxis == GemmAxis::channels) {
    return {index * (kTensor == GemmTensor::grid ? g.grid.c : g.weight_grid_channel), kEverywhere, kEverywhere};
  } else if constexpr (kAxis == GemmAxis::pixels) {
    const uint32_t columns = static_cast<uint32_t>(w.positions), rows = static_cast<uint32_t>(h.positions);
    const int j = static_cast<int>(index % columns), i = static_cast<int>(index / columns % rows);
    const int64_t n = index / columns / rows;
    if constexpr (kTensor == GemmTensor::image)
      return {n * g.image.n + (i * h.stride + h.start) * g.image.h + (j * w.stride + w.start) * g.image.w, h.inside(i),
              w.inside(j)};
    else
      return {n * g.grid.n + (h.place + i * h.step) * g.grid.h + (w.place + j * w.step) * g.grid.w, kEverywhere,
              kEverywhere};
  } else {
    const uint32_t window = static_cast<uint32_t>(h.taps * w.taps), across = static_cast<uint32_t>(w.taps);
    const uint32_t channel = kLayout == Layout::nhwc ? index % g.image_channels : index / window;
    const uint32_t tap = kLayout == Layout::nhwc ? index / g.image_channels : index % window;
    const int r = static_cast<int>(tap / across), s = static_cast<int>(tap % across);
    if constexpr (kTensor == GemmTensor::image)
      return {channel * g.image.c + r * h.reach * g.image.h + s * w.reach * g.image.w, 1u << r, 1u << s};
    else
      return {channel * g.weight_image_channel + (h.first + r * h.every) * g.weight_h +
                  (w.first + s * w.every) * g.weight_w,
              kEverywhere, kEverywhere};
  }
}

/// Which side of the product is what. Results are stored along their columns: pixels in NCHW, channels in NHWC.
template <ConvPass kPass, Layout kLayout>
struct GemmSides {
  static constexpr bool kWeightGrad = kPass == ConvPass::weight_grad, kNchw = kLayout == Layout::nchw;
  static constexpr GemmAxis kDepth = kWeightGrad ? GemmAxis::pixels : GemmAxis::taps;
  static constexpr GemmAxis kRows = kWeightGrad || kNchw ? GemmAxis::channels : GemmAxis::pixels;
  static constexpr GemmAxis kColumns = kWeightGrad ? GemmAxis::taps : kNchw ? GemmAxis::pixels : GemmAxis::channels;
  static constexpr GemmTensor kRowsTensor = kWeightGrad ? GemmTensor::grid
                                            : kNchw     ? GemmTensor::weight
                                                        : GemmTensor::image;
  static constexpr GemmTensor kColumnsTensor = kWeightGrad || kNchw ? GemmTensor::image : GemmTensor::weight;
  static constexpr GemmTensor kResult = kWeightGrad ? GemmTensor::weight : GemmTensor::grid;

  /// The index along which copies of `vector` elements go: that of neighbours in memory. A weight in NCHW has no
  /// neighbouring channels in an input gradient, unless the window is one pixel, but neighbouring taps.
  static constexpr GemmAxis contiguous(GemmTensor tensor, int vector) {
    if (tensor == GemmTensor::image) return kNchw ? GemmAxis::pixels : GemmAxis::taps;
    if (tensor == GemmTensor::grid) return kNchw ? GemmAxis::pixels : GemmAxis::channels;
    return kPass == ConvPass::input_grad && !(kNchw && vector == 1) ? GemmAxis::channels : GemmAxis::taps;
  }
};

}  // namespace fastconv::cuda
