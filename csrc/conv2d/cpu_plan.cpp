#include <cstddef>

#include "conv2d/gemm_plan.h"

namespace fastconv {
namespace {

/// A window that is the whole image sees it once: a fully connected layer, whose inputs lie in the order of its
/// weights. As such it has one tap; as a convolution its input gradient would multiply every tap but one by padding.
ConvProblem as_dense_layer(ConvProblem p) {
  const bool whole = p.p() == 1 && p.q() == 1 && p.h == p.r && p.w == p.s && p.padding.top == 0 && p.padding.left == 0;
  if (p.weight_is_nchw && p.layout == Layout::nhwc && p.r * p.s > 1) return p;
  if (!whole || p.stride.h != 1 || p.stride.w != 1 || (p.groups > 1 && p.layout == Layout::nhwc)) return p;
  p.c *= p.r * p.s;
  p.h = p.w = p.r = p.s = 1;
  p.dilation = {1, 1};
  p.padding = {};
  return p;
}

/// Where a tap reads, `distance` from a grid of `positions`. One that never meets the image reads zeros wherever it is,
/// so it is moved next to it: copies with padding then stay as small as the image, whatever the dilation.
int64_t near_image(int64_t distance, int64_t size, int64_t positions, int64_t step) {
  return max_of(-(positions - 1) * step - 1, min_of(distance, size));
}

/// Every tap of the window in the order of the weights, reading `dilation` apart from -padding.
std::vector<Tap> forward_taps(const ConvProblem& p) {
  const Strides4 weight = p.weight_strides();
  std::vector<Tap> taps;
  taps.reserve(static_cast<std::size_t>(p.r * p.s));
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      taps.push_back({near_image(r * p.dilation.h - p.padding.top, p.h, p.p(), p.stride.h),
                      near_image(s * p.dilation.w - p.padding.left, p.w, p.q(), p.stride.w),
                      r * weight.h + s * weight.w});
  return taps;
}

}  // namespace

GemmConv forward_product(const ConvProblem& problem, const void* input, const void* weight, void* output,
                         std::vector<Tap>& taps) {
  const ConvProblem p = as_dense_layer(problem);
  taps = forward_taps(p);
  const Strides4 w = p.weight_strides();
  GemmConv g{};
  g.groups = p.groups;
  g.n = p.n, g.c = p.c_per_group(), g.h = p.h, g.w = p.w;
  g.m = p.k_per_group(), g.i = p.p(), g.j = p.q();
  g.step = p.stride;
  g.x = input, g.x_strides = p.input_strides();
  g.weight = weight;
  g.weight_m_stride = w.n, g.weight_c_stride = w.c, g.weight_group_stride = p.k_per_group() * w.n;
  g.taps = taps.data(), g.tap_count = static_cast<int64_t>(taps.size());
  g.y = output, g.y_strides = p.output_strides(), g.y_offset = 0;
  return g;
}

GemmConv input_grad_product(const ConvProblem& problem, Size2 phase, const void* grad_output, const void* weight,
                            void* grad_input, std::vector<Tap>& taps) {
  const ConvProblem p = as_dense_layer(problem);
  // Input row a + stride * i receives from output row i + (a + pad - r * dilation) / stride where that divides exactly.
  const Strides4 w = p.weight_strides();
  const int64_t rows = ceil_div(p.h - phase.h, p.stride.h), columns = ceil_div(p.w - phase.w, p.stride.w);
  taps.clear();
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s) {
      const int64_t dh = phase.h + p.padding.top - r * p.dilation.h, dw = phase.w + p.padding.left - s * p.dilation.w;
      if (dh % p.stride.h == 0 && dw % p.stride.w == 0)
        taps.push_back({near_image(dh / p.stride.h, p.p(), rows, 1), near_image(dw / p.stride.w, p.q(), columns, 1),
                        r * w.h + s * w.w});
    }
  GemmConv g{};
  g.groups = p.groups;
  g.n = p.n, g.c = p.k_per_group(), g.h = p.p(), g.w = p.q();
  g.m = p.c_per_group();
  g.i = rows, g.j = columns;
  g.step = {1, 1};
  g.x = grad_output, g.x_strides = p.output_strides();
  g.weight = weight;
  g.weight_m_stride = w.c, g.weight_c_stride = w.n, g.weight_group_stride = p.k_per_group() * w.n;
  g.taps = taps.data(), g.tap_count = static_cast<int64_t>(taps.size());
  const Strides4 y = p.input_strides();
  g.y = grad_input, g.y_offset = phase.h * y.h + phase.w * y.w;
  g.y_strides = {y.n, y.c, y.h * p.stride.h, y.w * p.stride.w};
  return g;
}

GemmWeightGrad weight_grad_product(const ConvProblem& problem, const void* grad_output, const void* input,
                                   void* grad_weight, std::vector<Tap>& taps) {
  const ConvProblem p = as_dense_layer(problem);
  taps = forward_taps(p);
  GemmWeightGrad g{};
  g.layout = p.layout;
  g.groups = p.groups;
  g.n = p.n, g.c = p.c_per_group(), g.h = p.h, g.w = p.w;
  g.m = p.k_per_group(), g.i = p.p(), g.j = p.q();
  g.step = p.stride;
  g.x = input, g.x_strides = p.input_strides();
  g.grad_y = grad_output, g.grad_y_strides = p.output_strides();
  g.taps = taps.data(), g.tap_count = static_cast<int64_t>(taps.size());
  g.grad_weight = grad_weight;
  return g;
}

}  // namespace fastconv
