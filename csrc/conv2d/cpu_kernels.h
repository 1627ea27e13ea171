// The kernels of this family for one instruction set. Include after a common/simd/target_*.h.
#pragma once

#include "conv2d/cpu_channel_lanes.h"
#include "conv2d/cpu_channel_rows.h"
#include "conv2d/cpu_dense_rows.h"
#include "conv2d/cpu_energies.h"
#include "conv2d/cpu_group_lanes.h"
#include "conv2d/cpu_pixel_lanes.h"
#include "conv2d/cpu_rows.h"
#include "conv2d/cpu_weight_grad.h"
#include "conv2d/cpu_winograd.h"

namespace fastconv {
namespace {

/// Calls body(T{}) with the storage type; twin of checks.h's dispatch for units without torch.
template <class Body>
FASTCONV_INLINE void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::f16:
      return body(Half{});
    case DType::bf16:
      return body(BFloat16{});
  }
  __builtin_unreachable();
}

template <class T>
void bias_grad_of(const T* grad, T* out, int64_t n, int64_t k, int64_t plane, Layout layout) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t image_stride = k * plane;
  // Channels side by side are summed a vector at a time in NHWC; in NCHW lanes run along the plane.
  const int64_t blocks = layout == Layout::nhwc ? ceil_div(k, kLane) : k;
  parallel_for(0, blocks, ceil_div(8192, n * plane + 1), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      auto total = simd::zero<Acc>();
      if (layout == Layout::nhwc) {
        const int64_t live = min_of(kLane, k - block * kLane);
        for (int64_t pixel = 0; pixel < n * plane; ++pixel)
          total += live == kLane ? simd::load(grad + pixel * k + block * kLane)
                                 : simd::load_first(grad + pixel * k + block * kLane, live);
        simd::store_first<T>(out + block * kLane, total, live);
        continue;
      }
      for (int64_t image = 0; image < n; ++image) {
        const T* row = grad + image * image_stride + block * plane;
        int64_t i = 0;
        for (; i + kLane <= plane; i += kLane) total += simd::load(row + i);
        if (i < plane) total += simd::load_first(row + i, plane - i);
      }
      out[block] = simd::narrow<T>(simd::sum<Acc>(total));
    }
  });
}

inline constexpr Conv2dKernels kConv2dKernels = {
    [](const GemmConv& p, DType dtype) { for_dtype(dtype, [&](auto type) { convolve_naive<decltype(type)>(p); }); },
    [](const GemmWeightGrad& p, DType dtype) {
      for_dtype(dtype, [&](auto type) { weight_grad_naive<decltype(type)>(p); });
    },
    [](const GemmConv* products, int64_t count, Layout layout, DType dtype, const void* panels) {
      for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        if (count == 1 && dense_rows_serve(products[0])) return convolve_dense_rows<T>(products[0]);
        if (layout == Layout::nchw) return convolve_pixel_lanes<T>(products, count);
        const auto* kept = static_cast<const acc_t<T>*>(panels);
        for (int64_t i = 0; i < count; ++i) {
          const GemmConv& p = products[i];
          if (kept == nullptr && group_lanes_serve<T>(p)) convolve_group_lanes<T>(p);
          else if (channel_rows_serve(p)) convolve_channel_rows<T>(p, kept);
          else convolve_channel_lanes<T>(p, kept);
        }
      });
    },
    [](const GemmConv& p, DType dtype, void* panels) {
      for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        pack_weight_panels<T>(p, static_cast<acc_t<T>*>(panels));
      });
    },
    [](const GemmConv& p, DType dtype) {
      int64_t elems = 0;
      for_dtype(dtype, [&](auto type) { elems = weight_panel_elems<acc_t<decltype(type)>>(p); });
      return elems;
    },
    [](const GemmConv& p, DType dtype) { for_dtype(dtype, [&](auto type) { convolve_rows<decltype(type)>(p); }); },
    [](const GemmConv& p, Layout layout, DType dtype, WinogradForm form, const float* filters) {
      for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (!__is_same(T, double)) {
          if (form == WinogradForm::f2) convolve_winograd<Winograd2, T>(p, layout, filters);
          else convolve_winograd<Winograd4, T>(p, layout, filters);
        }
      });
    },
    [](const GemmConv& p, DType dtype, WinogradForm form, float* filters) {
      for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (!__is_same(T, double)) {
          if (form == WinogradForm::f2) transform_filters<Winograd2, T>(p, filters);
          else transform_filters<Winograd4, T>(p, filters);
        }
      });
    },
    [](const GemmConv& p, WinogradForm form) { return WinogradPlan(p, static_cast<int64_t>(form)).filter_elems(p); },
    [](const GemmConv& p, Layout layout, DType dtype, float* energies) {
      for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (!__is_same(T, double)) pixel_energies<T>(p, layout, energies);
      });
    },
    [](const GemmWeightGrad& p, DType dtype) {
      for_dtype(dtype, [&](auto type) { weight_grad_tiled<decltype(type)>(p); });
    },
    [](const void* grad, void* out, int64_t n, int64_t k, int64_t plane, Layout layout, DType dtype) {
      for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        bias_grad_of<T>(static_cast<const T*>(grad), static_cast<T*>(out), n, k, plane, layout);
      });
    },
};

}  // namespace
}  // namespace fastconv
