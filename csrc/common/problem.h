// What an op is asked to do, as plain numbers: shapes, output sizes, FLOPs and bytes.
// Shared by the host functions, the kernels of every instruction set and the introspection module; no torch here.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fastconv {

enum class DType : int32_t { f32, f64, f16, bf16 };
enum class Layout : int32_t { nchw, nhwc };
enum class Activation : int32_t { none, relu, relu6, tanh };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

/// The type sums are kept in: float32 for 16-bit and 32-bit storage, float64 for float64.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

FASTCONV_INLINE constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

FASTCONV_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTCONV_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FASTCONV_INLINE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCONV_INLINE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Size2 {
  int64_t h = 1, w = 1;
};

/// Rows and columns added on each side, in ONNX's order: begin of H, begin of W, end of H, end of W.
struct Pad4 {
  int64_t top = 0, left = 0, bottom = 0, right = 0;
};

/// Element strides of a four-dimensional tensor, named by axis whatever the memory format.
struct Strides4 {
  int64_t n, c, h, w;
};

FASTCONV_INLINE constexpr Strides4 strides_of(Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::nchw ? Strides4{c * h * w, h * w, w, 1} : Strides4{c * h * w, 1, w * c, c};
}

/// Output positions of a window of `window` taps, `dilation` apart, over `size` elements: the lecture's
/// floor((H_in - H_k + 2P) / S) + 1 with the dilated kernel for H_k. Not positive when the window does not fit.
FASTCONV_INLINE constexpr int64_t window_positions(int64_t size, int64_t pad_begin, int64_t pad_end, int64_t window,
                                                   int64_t dilation, int64_t stride) {
  const int64_t span = size + pad_begin + pad_end - dilation * (window - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

struct ConvProblem {
  int64_t n, c, h, w;  // input
  int64_t k, r, s;     // output channels, kernel rows, kernel columns
  Size2 stride, dilation;
  Pad4 padding;
  int64_t groups = 1;
  Layout layout = Layout::nchw;
  DType dtype = DType::f32;
  bool weight_is_nchw = false;  // whatever the layout

  FASTCONV_INLINE constexpr int64_t p() const {
    return window_positions(h, padding.top, padding.bottom, r, dilation.h, stride.h);
  }
  FASTCONV_INLINE constexpr int64_t q() const {
    return window_positions(w, padding.left, padding.right, s, dilation.w, stride.w);
  }
  FASTCONV_INLINE constexpr int64_t c_per_group() const { return c / groups; }
  FASTCONV_INLINE constexpr int64_t k_per_group() const { return k / groups; }
  FASTCONV_INLINE constexpr bool is_depthwise() const { return groups == c && groups > 1; }
  FASTCONV_INLINE constexpr Strides4 input_strides() const { return strides_of(layout, c, h, w); }
  FASTCONV_INLINE constexpr Strides4 output_strides() const { return strides_of(layout, k, p(), q()); }
  /// Weights are (K, C/groups, R, S), dense in the problem's own layout or in NCHW.
  FASTCONV_INLINE constexpr Strides4 weight_strides() const {
    return strides_of(weight_is_nchw ? Layout::nchw : layout, c_per_group(), r, s);
  }
  /// Two per multiply-add, counted on the output size as the lecture does.
  FASTCONV_INLINE constexpr int64_t flops() const { return 2 * n * k * p() * q() * c_per_group() * r * s; }
  /// Every tensor read or written once: what the memory bus must carry at least.
  FASTCONV_INLINE constexpr int64_t bytes() const {
    return (n * c * h * w + k * c_per_group() * r * s + n * k * p() * q()) * element_bytes(dtype);
  }
};

struct PoolProblem {
  int64_t n, c, h, w;  // input
  int64_t r, s;        // window
  Size2 stride, dilation, padding;
  bool ceil_mode = false;
  Layout layout = Layout::nchw;
  DType dtype = DType::f32;

  FASTCONV_INLINE constexpr int64_t p() const { return positions(h, padding.h, r, dilation.h, stride.h); }
  FASTCONV_INLINE constexpr int64_t q() const { return positions(w, padding.w, s, dilation.w, stride.w); }
  FASTCONV_INLINE constexpr Strides4 input_strides() const { return strides_of(layout, c, h, w); }
  FASTCONV_INLINE constexpr Strides4 output_strides() const { return strides_of(layout, c, p(), q()); }
  FASTCONV_INLINE constexpr int64_t flops() const { return n * c * p() * q() * r * s; }
  FASTCONV_INLINE constexpr int64_t bytes() const { return (n * c * h * w + n * c * p() * q()) * element_bytes(dtype); }

 private:
  // With ceil_mode the last window may hang over the end, but must start inside the input or its left padding.
  FASTCONV_INLINE constexpr int64_t positions(int64_t size, int64_t pad, int64_t window, int64_t dil,
                                              int64_t step) const {
    if (!ceil_mode) return window_positions(size, pad, pad, window, dil, step);
    const int64_t span = size + 2 * pad - dil * (window - 1) - 1;
    const int64_t rounded = span + step - 1;
    int64_t count = rounded < 0 ? 0 : rounded / step + 1;
    if (count > 0 && (count - 1) * step >= size + pad) --count;
    return count;
  }
};

}  // namespace fastconv
