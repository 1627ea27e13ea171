// Host side: a convolution, and its gradients, as the products of gemm_conv.h.
#pragma once

#include <vector>

#include "conv2d/gemm_conv.h"

namespace fastconv {

/// The forward pass. `taps` receives the storage that the result points into.
GemmConv forward_product(const ConvProblem& problem, const void* input, const void* weight, void* output,
                         std::vector<Tap>& taps);

/// The input gradient of phase (a, b): rows a, a + stride.h, ... and columns b, b + stride.w, ... of the input.
GemmConv input_grad_product(const ConvProblem& problem, Size2 phase, const void* grad_output, const void* weight,
                            void* grad_input, std::vector<Tap>& taps);

GemmWeightGrad weight_grad_product(const ConvProblem& problem, const void* grad_output, const void* input,
                                   void* grad_weight, std::vector<Tap>& taps);

}  // namespace fastconv
