// The CUDA launchers of this folder. They throw where refuse_depthwise_cuda gives a reason.
#pragma once

#include "conv2d/cuda_epilogue.h"

namespace fastconv::cuda {

/// y = epilogue(x * weight); all tensors dense in the problem's layout.
void launch_depthwise_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                              const CudaEpilogue& epilogue, cudaStream_t stream);
void launch_depthwise_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                 cudaStream_t stream);
/// `workspace` holds depthwise_weight_grad_workspace(p) float32 numbers.
int64_t depthwise_weight_grad_workspace(const ConvProblem& p);
void launch_depthwise_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                  float* workspace, cudaStream_t stream);

// By layout: planes for NCHW, channels for NHWC.
struct DepthwisePass;
void run_planes(const DepthwisePass& pass, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                cudaStream_t stream);
void run_channels(const DepthwisePass& pass, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                  cudaStream_t stream);

// Weight gradients: partial[slot][channel][tap], float32. Each returns how many slots it wrote; *_slots the most it
// may.
int planes_weight_grad_slots(const DepthwisePass& pass);
int run_planes_weight_grad(const DepthwisePass& pass, const void* grad_y, const void* x, float* partial,
                           cudaStream_t stream);
int channels_weight_grad_slots(const DepthwisePass& pass);
int run_channels_weight_grad(const DepthwisePass& pass, const void* grad_y, const void* x, float* partial,
                             cudaStream_t stream);

}  // namespace fastconv::cuda
