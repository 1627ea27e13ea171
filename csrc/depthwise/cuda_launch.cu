// Which kernels serve a depthwise problem: those of planes for NCHW, those of channels for NHWC.
#include "conv2d/cuda_slots.cuh"
#include "cuda_support/launchers.h"
#include "depthwise/cuda_launch.h"
#include "depthwise/cuda_pass.h"

namespace fastconv::cuda {

void launch_depthwise_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                              const CudaEpilogue& epilogue, cudaStream_t stream) {
  require_depthwise(p);
  const DepthwisePass pass = forward_pass(p);
  (p.layout == Layout::nchw ? run_planes : run_channels)(pass, x, weight, y, epilogue, stream);
}

void launch_depthwise_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                 cudaStream_t stream) {
  require_depthwise(p);
  const DepthwisePass pass = input_grad_pass(p);
  (p.layout == Layout::nchw ? run_planes : run_channels)(pass, grad_y, weight, grad_x, CudaEpilogue{}, stream);
}

int64_t depthwise_weight_grad_workspace(const ConvProblem& p) {
  require_depthwise(p);
  const auto slots = p.layout == Layout::nchw ? planes_weight_grad_slots : channels_weight_grad_slots;
  return slots(forward_pass(p)) * p.c * p.r * p.s;
}

void launch_depthwise_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                  float* workspace, cudaStream_t stream) {
  require_depthwise(p);
  const auto run = p.layout == Layout::nchw ? run_planes_weight_grad : run_channels_weight_grad;
  const int slots = run(forward_pass(p), grad_y, x, workspace, stream);
  launch_add_slots(p.dtype, workspace, grad_weight, slots, p.c * p.r * p.s, stream);
}

FASTCONV_LAUNCHER("conv2d", "depthwise", launch_depthwise_forward);
FASTCONV_LAUNCHER("conv2d_input_grad", "depthwise", launch_depthwise_input_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad", "depthwise", launch_depthwise_weight_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "depthwise", depthwise_weight_grad_workspace);

}  // namespace fastconv::cuda
