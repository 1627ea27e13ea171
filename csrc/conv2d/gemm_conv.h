// A convolution as the kernels see it: for every group g, image n and position (i, j) of a grid,
//
//   y[n, m, i, j] = epilogue(sum over c, t of weight[m, c, t] * x[n, c, i * step.h + dh[t], j * step.w + dw[t]])
//
// with x zero outside its plane. The forward pass is one such product. The input gradient of a convolution with
// stride (a, b) is a * b of them, one per phase of the input grid, each with the taps that reach that phase; so no
// multiplication by a zero that the stride put there, and every element of the gradient is written exactly once.
#pragma once

#include "common/problem.h"

namespace fastconv {

/// One kernel position: where it reads relative to the grid position, and where its weights start.
struct Tap {
  int64_t dh, dw;
  int64_t weight_offset_elems;
};

struct Epilogue {
  const void* scale = nullptr;     // accumulator type, one per output channel, or none
  const void* shift = nullptr;     // likewise
  const void* residual = nullptr;  // storage type, laid out as y, or none
  Activation activation = Activation::none;

  bool is_plain() const { return !scale && !shift && !residual && activation == Activation::none; }
};

struct GemmConv {
  int64_t groups;
  int64_t n, c, h, w;  // images; reduced channels per group; rows and columns of x
  int64_t m, i, j;     // output channels per group; rows and columns of the grid
  Size2 step;
  const void* x;
  Strides4 x_strides;  // in elements; a group starts c * x_strides.c after the one before
  const void* weight;
  int64_t weight_m_stride, weight_c_stride, weight_group_stride;
  const Tap* taps;
  int64_t tap_count;
  void* y;
  Strides4 y_strides;  // of the grid: one step of i or j; a group starts m * y_strides.c after the one before
  int64_t y_offset;    // of grid position (0, 0)
  Epilogue epilogue;
};

/// The weight gradient as a product: for every group,
///   grad_weight[m, c, t] = sum over n, i, j of grad_y[n, m, i, j] * x[n, c, i * step.h + dh[t], j * step.w + dw[t]]
/// written densely as (m, c, t) for Layout::nchw and (m, t, c) for Layout::nhwc.
struct GemmWeightGrad {
  Layout layout;
  int64_t groups;
  int64_t n, c, h, w;
  int64_t m, i, j;
  Size2 step;
  const void* x;
  Strides4 x_strides;
  const void* grad_y;
  Strides4 grad_y_strides;
  const Tap* taps;
  int64_t tap_count;
  void* grad_weight;
};

/// The forms of Winograd, by the rows and columns of a tile of outputs.
enum class WinogradForm : int64_t { f2 = 2, f4 = 4 };

/// What one instruction set offers for this family. Sums are kept in acc_t of the dtype.
struct Conv2dKernels {
  void (*naive)(const GemmConv&, DType);
  void (*naive_weight_grad)(const GemmWeightGrad&, DType);
  /// Products of one call that differ in their taps and output grids alone. `panels`, for a single one in Layout::nhwc:
  /// what tiled_panels made of the weight, or null.
  void (*tiled)(const GemmConv*, int64_t count, Layout, DType, const void* panels);
  /// The weight as `tiled` reads it in Layout::nhwc, in the type of the sums, whatever the image.
  void (*tiled_panels)(const GemmConv&, DType, void* panels);
  int64_t (*tiled_panel_elems)(const GemmConv&, DType);
  void (*rows)(const GemmConv&, DType);  // Layout::nchw only
  /// One group, taps within 3x3, step 1; no float64. `filters` as winograd_filters made them.
  void (*winograd)(const GemmConv&, Layout, DType, WinogradForm, const float* filters);
  /// Transforms the weights; filters[winograd_filter_elems - 1] is their largest magnitude, infinite or NaN if one is.
  void (*winograd_filters)(const GemmConv&, DType, WinogradForm, float* filters);
  int64_t (*winograd_filter_elems)(const GemmConv&, WinogradForm);
  /// energies[image][pixel] of x: the sum of squares over the channels. One group, no float64.
  void (*pixel_energies)(const GemmConv&, Layout, DType, float* energies);
  void (*tiled_weight_grad)(const GemmWeightGrad&, DType);
  /// out[k] = sum over n, h, w of grad[n, k, h, w]; `grad` dense in `layout`.
  void (*bias_grad)(const void* grad, void* out, int64_t n, int64_t k, int64_t plane, Layout, DType);
};

/// What avx512_bf16 adds to avx512's: products of bfloat16, those of one call, in either layout.
struct PairKernels {
  void (*convolve)(const GemmConv*, int64_t count, Layout);
  void (*weight_grad)(const GemmWeightGrad&);
};

const Conv2dKernels* conv2d_kernels_generic();
const Conv2dKernels* conv2d_kernels_neon();
const Conv2dKernels* conv2d_kernels_avx2();
const Conv2dKernels* conv2d_kernels_avx512();
const PairKernels* conv2d_pairs_avx512_bf16();

}  // namespace fastconv
