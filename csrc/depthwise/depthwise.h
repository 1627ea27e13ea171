// Depthwise convolution: one filter per input channel, or `k_per_group` of them (the channel multiplier).
#pragma once

#include "common/problem.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {

/// What one instruction set offers for this family. Tensors are dense in problem.layout and of problem.dtype, weights
/// are (K, R, S) in both layouts, sums are kept in acc_t of the dtype. Every element of the result is written.
struct DepthwiseKernels {
  void (*forward)(const ConvProblem&, const void* input, const void* weight, void* output, const Epilogue&);
  void (*input_grad)(const ConvProblem&, const void* grad_output, const void* weight, void* grad_input);
  void (*weight_grad)(const ConvProblem&, const void* grad_output, const void* input, void* grad_weight);
};

const DepthwiseKernels* depthwise_kernels_generic();
const DepthwiseKernels* depthwise_kernels_neon();
const DepthwiseKernels* depthwise_kernels_avx2();
const DepthwiseKernels* depthwise_kernels_avx512();

}  // namespace fastconv
