// Which kernels serve a depthwise problem: those of planes for NCHW, those of channels for NHWC.
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

FASTCONV_LAUNCHER("conv2d", "depthwise", launch_depthwise_forward);
FASTCONV_LAUNCHER("conv2d_input_grad", "depthwise", launch_depthwise_input_grad);

}  // namespace fastconv::cuda
