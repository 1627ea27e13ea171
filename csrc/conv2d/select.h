// Which CPU kernel serves a convolution, and why the others do not.
#pragma once

#include "common/isa.h"
#include "common/registry.h"
#include "conv2d/candidates.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {

inline const char* refuse_pairs(const ConvProblem& p, ConvPass) {
  if (p.dtype != DType::bf16) return "it multiplies pairs of bfloat16";
  return active_isa() == Isa::avx512_bf16 ? nullptr : "it needs the instruction set avx512_bf16";
}

inline const char* refuse_rows(const ConvProblem& p, ConvPass) {
  return p.layout == Layout::nchw ? nullptr : "it reads NCHW";
}

/// Direct convolution on padded rows pays where im2col is dear beside the products it serves, that is with few output
/// or input channels, and where rows are long beside the vectors that their last tile wastes.
inline const char* avoid_rows(const ConvProblem& p, ConvPass pass) {
  if (pass == ConvPass::weight_grad) return "its weight gradient is that of tiled";
  const bool forward = pass == ConvPass::forward;
  const int64_t width = forward ? p.q() : ceil_div(p.w, p.stride.w);
  const int64_t outputs = forward ? p.k_per_group() : p.c_per_group();
  const int64_t inputs = forward ? p.c_per_group() : p.k_per_group();
  if (p.r * p.s == 1) return "a 1x1 kernel leaves nothing to unfold";
  if (width < 12) return "rows of fewer than 12 outputs do not fill a tile";
  constexpr int64_t kHalo = 16;  // rows or columns; the largest kernel of a known network, 11x11, reaches over 10
  if (p.dilation.h * (p.r - 1) > kHalo || p.dilation.w * (p.s - 1) > kHalo)
    return "its taps lie so far apart that a padded copy would be mostly halo";
  // In percent of the products. Tiles that read rows where they are run about 13 percent slower (their loads straddle
  // cache lines and go through a table) and waste the end of a row. Im2col spends about 5 vector operations on what a
  // tile needs `outputs` for, 10 with a stride, 20 where all channels fall into the same cache sets, and 125 on
  // planning a tap, shared by the channels of a block of depth. Measured; csrc/conv2d/README.md.
  const int64_t plane_bytes = (forward ? p.h * p.w : p.p() * p.q()) * element_bytes(p.dtype);
  const int64_t copying = plane_bytes % 4096 == 0 ? 20 : forward && p.stride.w > 1 ? 10 : 5;
  const int64_t shared = max_of(1, min_of(inputs, 320 / (p.r * p.s)));
  const int64_t wasted = 13 + 100 * (round_up(width, 8) - width) / width;
  const int64_t unfolding = 100 * (copying * shared + 125) / (shared * max_of(outputs, 1));
  return wasted < unfolding ? nullptr : "its cut rows would waste more than im2col costs";
}

inline const char* refuse_winograd(const ConvProblem& p, ConvPass pass) {
  if (pass == ConvPass::weight_grad) return nullptr;
  if (p.dtype == DType::f64) return "its error is for float32 and shorter types";
  if (p.r != 3 || p.s != 3) return "it needs a 3x3 kernel";
  if (p.stride.h != 1 || p.stride.w != 1 || p.dilation.h != 1 || p.dilation.w != 1)
    return "it needs stride 1 and dilation 1";
  if (p.groups != 1) return "it needs groups == 1";
  return nullptr;
}

/// Products of a tile of each form of Winograd; outputs of a tile's row.
constexpr int64_t winograd_products(WinogradForm form) { return form == WinogradForm::f2 ? 16 : 36; }
constexpr int64_t winograd_outputs(WinogradForm form) { return form == WinogradForm::f2 ? 2 : 4; }

/// What decides whether Winograd pays, and which form of it: `kept` filters cost no transform.
struct WinogradCost {
  int64_t n, rows, columns, filters;  // of the output; filters are pairs of channels
  bool kept;

  WinogradCost(const ConvProblem& p, ConvPass pass, bool kept_filters)
      : n(p.n),
        rows(pass == ConvPass::forward ? p.p() : p.h),
        columns(pass == ConvPass::forward ? p.q() : p.w),
        filters(p.c * p.k),
        kept(kept_filters) {}

  int64_t tiles(WinogradForm form) const {
    return ceil_div(rows, winograd_outputs(form)) * ceil_div(columns, winograd_outputs(form));
  }
  int64_t filter_bytes(WinogradForm form) const { return 4 * winograd_products(form) * filters; }

  /// Of a call that transforms filters: more than the allocator reuses from call to call, and every page of fresh
  /// memory costs as much as its products. Of kept ones: what a layer may keep.
  bool fits(WinogradForm form) const { return filter_bytes(form) <= (kept ? 64 << 20 : 30 << 20); }

  bool beyond_caches() const { return filter_bytes(WinogradForm::f4) > 16 << 20; }

  /// Products of a filter. The transform of one number costs as much as 20 products; reading it, kept, hides behind 4,
  /// or 10 from beyond the caches.
  int64_t products(WinogradForm form) const {
    const int64_t read = beyond_caches() ? 10 : 4;
    return winograd_products(form) * (kept ? max_of(n * tiles(form), read) : n * tiles(form) + 20);
  }

  /// F(2x2) has more products, but smaller filters, and less beside small images.
  WinogradForm form() const {
    if (!fits(WinogradForm::f4)) return WinogradForm::f2;
    return products(WinogradForm::f2) <= products(WinogradForm::f4) ? WinogradForm::f2 : WinogradForm::f4;
  }

  /// Less than a third saved of the 9 products an output, or hardly a tile.
  bool hangs_over() const {
    return min_of(rows, columns) < 4 || 6 * rows * columns < winograd_products(form()) * tiles(form());
  }
};

/// Winograd computes in float32; dot products of pairs of bfloat16 have twice the rate, and transform no filters.
inline const char* avoid_winograd_beside_pairs(const ConvProblem& p, ConvPass pass, const WinogradCost& cost) {
  if (refuse_pairs(p, pass) != nullptr) return nullptr;
  if (cost.form() == WinogradForm::f2) return "F(2x2) saves too few products beside pairs of bfloat16";
  if (cost.n * cost.rows * cost.columns < 600)
    return "beside pairs of bfloat16 fewer than 600 pixels do not pay for the transform of the filters";
  return nullptr;
}

/// A quarter of the products, or less than half, for transforms of inputs, outputs and, in every call, filters.
/// Measured; csrc/conv2d/README.md.
inline const char* avoid_winograd(const ConvProblem& p, ConvPass pass) {
  if (pass == ConvPass::weight_grad) return "its weight gradient is that of tiled";
  const WinogradCost cost(p, pass, false);
  if (p.h * p.w == 0) return "there are no pixels to judge its condition by";
  if (min_of(p.c, p.k) < 32) return "so few channels do not pay for the transforms of inputs and outputs";
  if (!cost.fits(cost.form())) return "the transformed filters would take more than 30 MiB";
  if (cost.n * cost.rows * cost.columns < 100)
    return "fewer than 100 pixels do not pay for the transform of the filters";
  if (cost.hangs_over()) return "its tiles would hang over the edge";
  return avoid_winograd_beside_pairs(p, pass, cost);
}

/// Null if transformed filters that were kept (conv2d_pack) can serve a forward pass, else the reason.
inline const char* refuse_packed(const ConvProblem& p) {
  if (const char* reason = refuse_winograd(p, ConvPass::forward)) return reason;
  // On smaller ones taps that never meet the image are moved (cpu_plan.cpp), and the filters with them.
  return min_of(p.h, p.w) < 4 ? "images of fewer than 4 rows or columns have filters of their own" : nullptr;
}

/// As avoid_winograd, where the transform of the filters costs nothing. Measured; csrc/conv2d/README.md.
inline const char* avoid_packed(const ConvProblem& p) {
  const WinogradCost cost(p, ConvPass::forward, true);
  if (min_of(p.c, p.k) < 32) return "so few channels do not pay for the transforms";
  if (!cost.fits(cost.form())) return "a layer keeps 64 MiB of one form of filters at most";
  if (cost.beyond_caches() && cost.n * cost.rows * cost.columns < 25)
    return "for so few pixels the weights themselves are read sooner";
  return cost.hangs_over() ? "its tiles would hang over the edge" : nullptr;
}

/// One pixel an image, which `tiled` multiplies with weights where they are (cpu_dense_rows.h).
inline bool is_dense_layer_of_rows(const ConvProblem& p) {
  const bool whole = p.p() * p.q() == 1 && p.h == p.r && p.w == p.s && p.padding.top == 0 && p.padding.left == 0;
  return p.layout == Layout::nhwc && whole && (p.r * p.s == 1 || (p.groups == 1 && !p.weight_is_nchw));
}

inline const char* avoid_pairs(const ConvProblem& p, ConvPass pass) {
  if (pass == ConvPass::forward && p.n <= 4 && is_dense_layer_of_rows(p))
    return "for so few pixels tiled reads the weights where they are";
  if (p.layout == Layout::nhwc && p.groups > 1 && max_of(p.c_per_group(), p.k_per_group()) <= 8)
    return "groups of so few channels share registers in tiled";
  if (pass == ConvPass::weight_grad && p.c_per_group() < 16)
    return "of its weight gradient few input channels leave vectors empty";
  return nullptr;
}

inline constexpr ConvCandidate<Kernel> kConvCandidates[] = {
    {"winograd", Kernel::conv2d_winograd, Kernel::conv2d_input_grad_winograd, Kernel::conv2d_weight_grad_tiled,
     &refuse_winograd, &avoid_winograd},
    {"depthwise", Kernel::depthwise, Kernel::depthwise_input_grad, Kernel::depthwise_weight_grad,
     [](const ConvProblem& problem, ConvPass) -> const char* {
       return problem.is_depthwise() ? nullptr : "it needs groups == in_channels, and more than one";
     },
     &refuse_nothing},
    {"pairs", Kernel::conv2d_pairs, Kernel::conv2d_input_grad_pairs, Kernel::conv2d_weight_grad_pairs, &refuse_pairs,
     &avoid_pairs},
    {"rows", Kernel::conv2d_rows, Kernel::conv2d_input_grad_rows, Kernel::conv2d_weight_grad_tiled, &refuse_rows,
     &avoid_rows},
    {"tiled", Kernel::conv2d_tiled, Kernel::conv2d_input_grad_tiled, Kernel::conv2d_weight_grad_tiled, &refuse_nothing,
     &refuse_nothing},
    {"naive", Kernel::conv2d_naive, Kernel::conv2d_input_grad_naive, Kernel::conv2d_weight_grad_naive, &refuse_nothing,
     &refuse_nothing},
};

/// `algo` may also be "direct": whatever is best without Winograd.
inline Kernel select_conv2d(const ConvProblem& problem, ConvPass pass, std::string_view algo) {
  if (algo == "direct")
    for (const ConvCandidate<Kernel>& candidate : kConvCandidates)
      if (candidate.algo != "winograd" && !candidate.refuse(problem, pass) && !candidate.avoid(problem, pass))
        return candidate.kernel(pass);
  return select_conv2d(kConvCandidates, problem, pass, algo);
}

/// Null if a forward kernel reads the weight in a form that may be kept from call to call (conv2d_pack), else the
/// reason.
inline const char* refuse_keeping(const ConvProblem& p, Kernel kernel) {
  if (kernel == Kernel::conv2d_winograd) return refuse_packed(p);
  if (kernel == Kernel::conv2d_pairs) return "pairs pack the weight in every call";
  if (kernel != Kernel::conv2d_tiled) return "only winograd and tiled have a form of their own";
  if (p.layout == Layout::nchw) return "in NCHW tiled reads weights as they are";
  if (p.groups > 1 && p.k_per_group() < 16) return "panels of so few output channels a group are mostly padding";
  const int64_t panels = p.k * p.c_per_group() * p.r * p.s * (p.dtype == DType::f64 ? 8 : 4);
  return panels > 64 << 20 ? "its panels would take more than 64 MiB" : nullptr;
}

/// The kernel of a forward pass that has kept filters.
inline Kernel select_packed_conv2d(const ConvProblem& problem) {
  if (!refuse_packed(problem) && !avoid_packed(problem)) return Kernel::conv2d_winograd;
  return select_conv2d(problem, ConvPass::forward, "");
}

/// The values that a kernel is chosen for, when it is not named; null if it is all. Other images go to the kernel of
/// algo="direct" (cpu_winograd_condition.h).
inline const char* winograd_condition(Kernel kernel, WinogradForm form) {
  if (kernel != Kernel::conv2d_winograd && kernel != Kernel::conv2d_input_grad_winograd) return nullptr;
  if (form == WinogradForm::f2) return "finite images (csrc/conv2d/README.md); others as algo=\"direct\"";
  return "finite images without large values beside small ones (csrc/conv2d/README.md); others as algo=\"direct\"";
}

}  // namespace fastconv
