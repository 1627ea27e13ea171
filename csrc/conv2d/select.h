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
};

inline constexpr ConvCandidate kConvCandidates[] = {
    {"depthwise", Kernel::depthwise, Kernel::depthwise_input_grad, Kernel::depthwise_weight_grad,
     [](const ConvProblem& problem, ConvPass) -> const char* {
       return problem.is_depthwise() ? nullptr : "it needs groups == in_channels, and more than one";
     }},
    {"tiled", Kernel::conv2d_tiled, Kernel::conv2d_input_grad_tiled, Kernel::conv2d_weight_grad_tiled,
     [](const ConvProblem&, ConvPass) -> const char* { return nullptr; }},
    {"naive", Kernel::conv2d_naive, Kernel::conv2d_input_grad_naive, Kernel::conv2d_weight_grad_naive,
     [](const ConvProblem&, ConvPass) -> const char* { return nullptr; }},
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

/// The kernel called `algo`, or the first that does not refuse when `algo` is empty. Throws std::runtime_error if there
/// is no such kernel or it refuses.
inline Kernel select_conv2d(const ConvProblem& problem, ConvPass pass, std::string_view algo) {
  std::string known;
  for (const ConvCandidate& candidate : kConvCandidates) {
    if (!algo.empty() && candidate.algo != algo) continue;
    const char* reason = candidate.refuse(problem, pass);
    if (reason == nullptr) return kernel_of(candidate, pass);
    if (!algo.empty()) throw std::runtime_error("conv2d: algo=\"" + std::string(algo) + "\" refuses: " + reason);
  }
  for (const ConvCandidate& candidate : kConvCandidates)
    known += (known.empty() ? "" : ", ") + std::string(candidate.algo);
  throw std::runtime_error("conv2d: there is no algo \"" + std::string(algo) + "\"; choose one of " + known);
}

}  // namespace fastconv
