// Which CPU kernel serves a convolution, and why the others do not.
#pragma once

#include "common/isa.h"
#include "common/registry.h"
#include "conv2d/candidates.h"

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

/// A quarter of the products, for transforms of inputs, outputs and, in every call, filters. Measured;
/// csrc/conv2d/README.md.
inline const char* avoid_winograd(const ConvProblem& p, ConvPass pass) {
  if (pass == ConvPass::weight_grad) return "its weight gradient is that of tiled";
  const bool forward = pass == ConvPass::forward;
  const int64_t rows = forward ? p.p() : p.h, columns = forward ? p.q() : p.w;
  if (p.h * p.w == 0) return "there are no pixels to judge its condition by";
  if (min_of(p.c, p.k) < (p.layout == Layout::nchw ? 48 : 32))
    return "so few channels do not pay for the transforms of inputs and outputs";
  // More than the allocator reuses from call to call, and every page of fresh memory costs as much as its products.
  if (36 * 4 * p.c * p.k > 30 << 20) return "the transformed filters would take more than 30 MiB";
  // It computes in float32; dot products of pairs have twice the rate.
  const bool pairs = refuse_pairs(p, pass) == nullptr;
  if (pairs && p.layout == Layout::nchw && max_of(p.c, p.k) > 128) return "pairs of bfloat16 do as well";
  if (pairs && p.n * rows * columns < 1600)
    return "beside pairs of bfloat16 fewer than 1600 pixels do not pay for the transform of the filters";
  if (p.n * rows * columns < 600) return "fewer than 600 pixels do not pay for the transform of the filters";
  if (2 * round_up(rows, 4) * round_up(columns, 4) > 3 * rows * columns)
    return "its 4x4 tiles would hang over the edge";
  return nullptr;
}

/// Null if transformed filters that were kept (conv2d_pack) can serve a forward pass, else the reason.
inline const char* refuse_packed(const ConvProblem& p) {
  if (const char* reason = refuse_winograd(p, ConvPass::forward)) return reason;
  // On smaller ones taps that never meet the image are moved (cpu_plan.cpp), and the filters with them.
  return min_of(p.h, p.w) < 4 ? "images of fewer than 4 rows or columns have filters of their own" : nullptr;
}

/// As avoid_winograd, where the transform of the filters costs nothing. Measured; csrc/conv2d/README.md.
inline const char* avoid_packed(const ConvProblem& p) {
  const bool nchw = p.layout == Layout::nchw;
  const int64_t rows = p.p(), columns = p.q();
  if (avoid_winograd(p, ConvPass::forward) == nullptr) return nullptr;
  if (nchw && refuse_pairs(p, ConvPass::forward) == nullptr) return "pairs of bfloat16 do as well";
  if (min_of(p.c, p.k) < (nchw ? 256 : 32)) return "so few channels do not pay for the transforms";
  if (min_of(rows, columns) < (nchw ? 14 : 7)) return "so few tiles leave vectors empty";
  if (36 * 4 * p.c * p.k > 64 << 20) return "a layer keeps 64 MiB of filters at most";
  if (2 * round_up(rows, 4) * round_up(columns, 4) > 3 * rows * columns) return "its tiles would hang over the edge";
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
     [](const ConvProblem& p, ConvPass pass) -> const char* {
       if (pass != ConvPass::weight_grad || p.c_per_group() >= 16) return nullptr;
       return "of its weight gradient few input channels leave vectors empty";
     }},
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

/// The kernel of a forward pass that has kept filters.
inline Kernel select_packed_conv2d(const ConvProblem& problem) {
  if (!refuse_packed(problem) && !avoid_packed(problem)) return Kernel::conv2d_winograd;
  return select_conv2d(problem, ConvPass::forward, "");
}

/// The values that a kernel is chosen for, when it is not named; null if it is all. Other images go to the kernel of
/// algo="direct" (cpu_winograd_condition.h).
inline const char* winograd_condition(Kernel kernel) {
  if (kernel != Kernel::conv2d_winograd && kernel != Kernel::conv2d_input_grad_winograd) return nullptr;
  return "finite images without large values beside small ones (csrc/conv2d/README.md); others as algo=\"direct\"";
}

}  // namespace fastconv
