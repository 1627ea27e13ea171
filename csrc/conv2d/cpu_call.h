// A convolution on plain memory, for callers that know its operands: the executor of networks.
#pragma once

#include "common/checks.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
void convolve_kept(const ConvProblem& p, const void* x, const void* weight, const Tensor* packed,
                   const Epilogue& epilogue, void* y);
}  // namespace fastconv
