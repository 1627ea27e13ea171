// Which images of a call Winograd's kernel may compute when nobody named it. Host side; see README.md, "Winograd".
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {

/// A product as Winograd computes it, with its transformed filters: its own, or those that conv2d_pack made.
class WinogradProduct {
 public:
  WinogradProduct(const Conv2dKernels& kernels, const GemmConv& p, Layout layout, DType dtype, WinogradForm form,
                  const float* kept)
      : kernels_(kernels),
        layout_(layout),
        dtype_(dtype),
        form_(form),
        elems_(kernels.winograd_filter_elems(p, form_)),
        own_(kept ? 0 : elems_ * static_cast<int64_t>(sizeof(float))),
        filters_(kept ? kept : own_.as<float>()) {
    if (!kept) kernels.winograd_filters(p, dtype, form_, own_.as<float>());
  }

  void run(const GemmConv& p) const { kernels_.winograd(p, layout_, dtype_, form_, filters_); }

  /// False if a number on the way could be infinite, for pixels of at most this sum of squares.
  bool stays_finite(const GemmConv& p, double largest_energy) const {
    // The transforms gain at most a factor of 25 in the inputs, 2.2 in the filters, 55 in the outputs.
    const double peak = filters_[elems_ - 1];
    const double gain = 25 * 2.2 * 55 * static_cast<double>(p.c);
    return gain * peak * std::sqrt(largest_energy) < std::numeric_limits<float>::max();
  }

 private:
  const Conv2dKernels& kernels_;
  Layout layout_;
  DType dtype_;
  WinogradForm form_;
  int64_t elems_;
  Scratch own_;
  const float* filters_;
};

/// For each image, from it alone: the largest sum of squares of a pixel, or NaN if the image does not meet the
/// condition on inputs. F(2x2) wants finite ones, and no more: its errors reach only outputs that read their cause.
std::vector<double> winograd_energies(const Conv2dKernels& kernels, const GemmConv& p, Layout layout, DType dtype,
                                      WinogradForm form);

/// The part of a product that belongs to images [begin, end).
inline GemmConv images_of(GemmConv p, int64_t begin, int64_t end, DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  p.n = end - begin;
  p.x = static_cast<const char*>(p.x) + begin * p.x_strides.n * bytes;
  p.y = static_cast<char*>(p.y) + begin * p.y_strides.n * bytes;
  if (p.epilogue.residual)
    p.epilogue.residual = static_cast<const char*>(p.epilogue.residual) + begin * p.y_strides.n * bytes;
  return p;
}

/// Runs of neighbouring images that are computed alike: body(product, fit).
template <class Fits, class Body>
void for_image_runs(const GemmConv& p, DType dtype, const Fits& fits, const Body& body) {
  for (int64_t begin = 0, end = 0; begin < p.n; begin = end) {
    const bool alike = fits(begin);
    while (end < p.n && fits(end) == alike) ++end;
    body(images_of(p, begin, end, dtype), alike);
  }
}

}  // namespace fastconv
