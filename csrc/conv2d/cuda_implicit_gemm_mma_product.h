// A convolution, or its input gradient, as the product that implicit_gemm_mma computes for every group:
//
//   y[channel, pixel] = sum over depth channels d and taps t of
//                       weight[channel, d, t] * x[d, pixel * step + offset of t]
//
// gemm_conv.h says the same of the CPU kernels. An input gradient with strides (a, b) is a * b such products
// ("phases"), all of them in one launch; the forward pass is one phase. How the axes of a phase follow from the
// convolution's is worked out here, by the kernel itself: a table for every phase would not fit among its parameters.
#pragma once

#include "common/problem.h"
#include "cuda_support/fast_divide.h"

namespace fastconv::cuda {

/// One axis of a convolution.
struct ConvAxis {
  int in = 1, out = 1, taps = 1, stride = 1, dilation = 1, padding = 0;
};

/// One axis of the product in one phase. Position i of its grid reads element i * step + start + tap * distance and
/// writes element i * write_step + phase.
struct MmaAxis {
  int read_size, step, start, distance;
  int taps, first_tap, tap_step;  // that reach the phase, and which rows of the window they are
  int write_size, write_step, phase;
};

FASTCONV_INLINE constexpr MmaAxis forward_axis(const ConvAxis& a) {
  return {a.in, a.stride, -a.padding, a.dilation, a.taps, 0, 1, a.out, 1, 0};
}

/// Elements phase, phase + stride, ... of the input. Tap r reaches them where phase + padding - r * dilation is a
/// multiple of the stride: every stride / gcd(stride, dilation)-th tap, or none.
FASTCONV_INLINE constexpr MmaAxis input_grad_axis(const ConvAxis& a, int phase) {
  int common = a.stride;
  for (int rest = a.dilation; rest != 0;) {
    const int next = common % rest;
    common = rest, rest = next;
  }
  const int tap_step = a.stride / common;
  int first = 0;
  const int last = tap_step < a.taps ? tap_step : a.taps;
  while (first < last && (phase + a.padding - first * a.dilation) % a.stride != 0) ++first;
  const int taps = first < last ? (a.taps - first + tap_step - 1) / tap_step : 0;
  const int start = (phase + a.padding - first * a.dilation) / a.stride;
  return {a.out, 1, start, -(a.dilation / common), taps, first, tap_step, a.in, a.stride, phase};
}

/// Strides in elements; pixels of an image are `pixel` apart, the next row follows at once.
struct MmaTensor {
  int64_t image = 0;
  int channel = 1, pixel = 1;
};

/// What a kernel is told.
struct MmaProduct {
  ConvAxis h, w;
  bool is_input_grad = false;
  int phases_w = 1;             // phases are numbered h * phases_w + w
  int pixels = 0;               // of the grid of a phase, all images
  FastDivide by_plane, by_row;  // a pixel's number is (image, row, column)
  int channels = 0, depth = 0;  // of a group: of the result, and summed over
  int channel_tiles = 1;        // blocks along x are (tile of pixels, tile of channels)
  MmaTensor read, written;
  int weight_channel = 0, weight_depth = 0, weight_row = 0, weight_column = 0;  // strides
  int64_t weight_group = 0;
  int shares = 1;               // of the depth, in whole slices (split-K): blocks along y are (phase, share)
  int64_t results = 0;          // numbers of a share's sums
  bool stores_vectors = false;  // 16 bytes of the result along the memory axis are one aligned piece of it

  MmaProduct() = default;

  MmaProduct(const ConvProblem& p, bool input_grad) : is_input_grad(input_grad) {
    const auto narrow = [](int64_t value) { return static_cast<int>(value); };
    h = {narrow(p.h), narrow(p.p()), narrow(p.r), narrow(p.stride.h), narrow(p.dilation.h), narrow(p.padding.top)};
    w = {narrow(p.w), narrow(p.q()), narrow(p.s), narrow(p.stride.w), narrow(p.dilation.w), narrow(p.padding.left)};
    const int64_t rows = input_grad ? ceil_div(p.h, p.stride.h) : p.p();
    const int64_t columns = input_grad ? ceil_div(p.w, p.stride.w) : p.q();
    phases_w = input_grad ? w.stride : 1;
    pixels = narrow(p.n * rows * columns);
    by_plane = FastDivide(rows * columns), by_row = FastDivide(columns);
    channels = narrow(input_grad ? p.c_per_group() : p.k_per_group());
    depth = narrow(input_grad ? p.k_per_group() : p.c_per_group());
    const Strides4 xs = p.input_strides(), ys = p.output_strides(), ws = p.weight_strides();
    const MmaTensor input{xs.n, narrow(xs.c), narrow(xs.w)}, output{ys.n, narrow(ys.c), narrow(ys.w)};
    read = input_grad ? output : input, written = input_grad ? input : output;
    weight_channel = narrow(input_grad ? ws.c : ws.n), weight_depth = narrow(input_grad ? ws.n : ws.c);
    weight_row = narrow(ws.h), weight_column = narrow(ws.w);
    weight_group = p.k_per_group() * ws.n;
    results = input_grad ? p.n * xs.n : p.n * ys.n;
  }

  int phases() const { return is_input_grad ? h.stride * w.stride : 1; }

  __device__ __forceinline__ MmaAxis axis_h(int phase) const {
    return is_input_grad ? input_grad_axis(h, phase / phases_w) : forward_axis(h);
  }
  __device__ __forceinline__ MmaAxis axis_w(int phase) const {
    return is_input_grad ? input_grad_axis(w, phase % phases_w) : forward_axis(w);
  }
};

}  // namespace fastconv::cuda
