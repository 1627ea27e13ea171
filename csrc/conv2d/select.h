// Which kernel serves a convolution, and why the others do not. No torch here: the host functions and the introspection
// module ask the same question and must get the same answer.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "common/problem.h"
#include "common/registry.h"

namespace fastconv {

enum class ConvPass { forward, input_grad, weight_grad };

/// A kernel of each pass, by algorithm; the order is the order of preference.
struct ConvCandidate {
  std::string_view algo;
  Kernel forward, input_grad, weight_grad;
  /// Null if the kernel can serve the problem, else the reason it refuses.
  const char* (*refuse)(const ConvProblem&, ConvPass);
  /// Null if the kernel is worth choosing when nobody asks for it by name, else why a later candidate does better.
  const char* (*avoid)(const ConvProblem&, ConvPass);
};

inline const char* refuse_nothing(const ConvProblem&, ConvPass) { return nullptr; }

inline const char* refuse_rows(const ConvProblem& p, ConvPass pass) {
  if (pass == ConvPass::weight_grad) return "it has no weight gradient";
  return p.layout == Layout::nchw ? nullptr : "it reads NCHW";
}

/// Direct convolution on padded rows pays where im2col is dear beside the products it serves, that is with few output
/// or input channels, and where rows are long beside the vectors that their last tile wastes.
inline const char* avoid_rows(const ConvProblem& p, ConvPass pass) {
  const bool forward = pass == ConvPass::forward;
  const int64_t width = forward ? p.q() : ceil_div(p.w, p.stride.w);
  const int64_t outputs = forward ? p.k_per_group() : p.c_per_group();
  const int64_t inputs = forward ? p.c_per_group() : p.k_per_group();
  if (p.r * p.s == 1) return "a 1x1 kernel leaves nothing to unfold";
  if (width < 16) return "rows of fewer than 16 outputs do not fill a tile";
  // In percent of the products. Tiles that read rows where they are run about 10 percent slower (their loads straddle
  // cache lines and go through a table) and waste the end of a row. Im2col spends about 5 vector operations on what a
  // tile needs `outputs` for, 10 with a stride, and 150 on planning a tap, shared by the channels of a block.
  const int64_t wasted = 10 + 100 * (round_up(width, 8) - width) / width;
  const int64_t unfolding = 100 * ((forward && p.stride.w > 1 ? 10 : 5) + 150 / max_of(inputs, 1)) / max_of(outputs, 1);
  return wasted < unfolding ? nullptr : "its cut rows would waste more than im2col costs";
}

inline constexpr ConvCandidate kConvCandidates[] = {
    {"depthwise", Kernel::depthwise, Kernel::depthwise_input_grad, Kernel::depthwise_weight_grad,
     [](const ConvProblem& problem, ConvPass) -> const char* {
       return problem.is_depthwise() ? nullptr : "it needs groups == in_channels, and more than one";
     },
     &refuse_nothing},
    {"rows", Kernel::conv2d_rows, Kernel::conv2d_input_grad_rows, Kernel::conv2d_weight_grad_tiled, &refuse_rows,
     &avoid_rows},
    {"tiled", Kernel::conv2d_tiled, Kernel::conv2d_input_grad_tiled, Kernel::conv2d_weight_grad_tiled, &refuse_nothing,
     &refuse_nothing},
    {"naive", Kernel::conv2d_naive, Kernel::conv2d_input_grad_naive, Kernel::conv2d_weight_grad_naive, &refuse_nothing,
     &refuse_nothing},
};

inline Kernel kernel_of(const ConvCandidate& candidate, ConvPass pass) {
  switch (pass) {
    case ConvPass::forward:
      return candidate.forward;
    case ConvPass::input_grad:
      return candidate.input_grad;
    case ConvPass::weight_grad:
      return candidate.weight_grad;
  }
  throw std::logic_error("unknown pass");
}

/// The kernel called `algo`, or when `algo` is empty the first that neither refuses nor is to be avoided. Throws
/// std::runtime_error if there is no such kernel or it refuses.
inline Kernel select_conv2d(const ConvProblem& problem, ConvPass pass, std::string_view algo) {
  std::string known;
  for (const ConvCandidate& candidate : kConvCandidates) {
    if (!algo.empty() && candidate.algo != algo) continue;
    const char* reason = candidate.refuse(problem, pass);
    if (reason == nullptr && algo.empty()) reason = candidate.avoid(problem, pass);
    if (reason == nullptr) return kernel_of(candidate, pass);
    if (!algo.empty()) throw std::runtime_error("conv2d: algo=\"" + std::string(algo) + "\" refuses: " + reason);
  }
  for (const ConvCandidate& candidate : kConvCandidates)
    known += (known.empty() ? "" : ", ") + std::string(candidate.algo);
  throw std::runtime_error("conv2d: there is no algo \"" + std::string(algo) + "\"; choose one of " + known);
}

}  // namespace fastconv
