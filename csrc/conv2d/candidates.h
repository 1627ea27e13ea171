// How a kernel is chosen for a convolution, on any device: candidates in order of preference, each with the reason why
// it refuses a problem or should be passed over. No torch here: the host functions and the introspection module ask the
// same question and must get the same answer.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common/problem.h"

namespace fastconv {

enum class ConvPass { forward, input_grad, weight_grad };

/// A kernel of each pass, by algorithm; `Id` is the enumeration of a device's kernels (common/registry.h).
template <class Id>
struct ConvCandidate {
  std::string_view algo;
  Id forward, input_grad, weight_grad;
  /// Null if the kernel can serve the problem, else the reason it refuses.
  const char* (*refuse)(const ConvProblem&, ConvPass);
  /// Null if the kernel is worth choosing when nobody asks for it by name, else why a later candidate does better.
  const char* (*avoid)(const ConvProblem&, ConvPass);

  constexpr Id kernel(ConvPass pass) const {
    return pass == ConvPass::forward ? forward : pass == ConvPass::input_grad ? input_grad : weight_grad;
  }
};

inline const char* refuse_nothing(const ConvProblem&, ConvPass) { return nullptr; }

/// The kernel called `algo`, or when `algo` is empty the first that neither refuses nor is to be avoided. Throws
/// std::runtime_error if there is no such kernel or it refuses.
template <class Id, std::size_t count>
Id select_conv2d(const ConvCandidate<Id> (&candidates)[count], const ConvProblem& problem, ConvPass pass,
                 std::string_view algo) {
  const char* last_reason = nullptr;
  for (const ConvCandidate<Id>& candidate : candidates) {
    if (!algo.empty() && candidate.algo != algo) continue;
    const char* reason = candidate.refuse(problem, pass);
    if (reason == nullptr && algo.empty()) reason = candidate.avoid(problem, pass);
    if (reason == nullptr) return candidate.kernel(pass);
    if (!algo.empty()) throw std::runtime_error("conv2d: algo=\"" + std::string(algo) + "\" refuses: " + reason);
    last_reason = reason;
  }
  if (algo.empty())
    throw std::runtime_error(std::string("conv2d: no kernel serves this problem; ") +
                             std::string(candidates[count - 1].algo) + ", the most general, says: " + last_reason);
  std::string known;
  for (const ConvCandidate<Id>& candidate : candidates)
    known += (known.empty() ? "" : ", ") + std::string(candidate.algo);
  throw std::runtime_error("conv2d: there is no algo \"" + std::string(algo) + "\"; choose one of " + known);
}

}  // namespace fastconv
