// Which kernels serve a depthwise problem: those of planes for NCHW, those of channels for NHWC.
//
// And the second pass of the weight gradients, which adds partial[slot][channel][tap] over the slots.
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "depthwise/cuda_launch.h"
#include "depthwise/cuda_pass.h"

namespace fastconv::cuda {
namespace {

constexpr int kSumColumns = 32, kSumRows = 16;

/// Thread (i, j) adds every 16th slot from j on for one weight: hundreds of slots one after another would take longer
/// than the first pass. Then thread (i, 0) adds the 16 sums.
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    add_slots(const float* partial, T* grad_weight, int slots, int64_t weights) {
  FASTCONV_SHARED(sums, float[kSumRows][kSumColumns]);
  const int64_t weight = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  float sum = 0;
  if (weight < weights) {
#pragma unroll 4
    for (int slot = threadIdx.y; slot < slots; slot += kSumRows) sum += partial[slot * weights + weight];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || weight >= weights) return;
#pragma unroll
  for (int row = 1; row < kSumRows; ++row) sum += sums[row][threadIdx.x];
  grad_weight[weight] = from_float<T>(sum);
}

}  // namespace

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
  const int64_t weights = p.c * p.r * p.s;
  dispatch_element("depthwise weight gradient", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(add_slots<T>), blocks_for(weights, kSumColumns), dim3(kSumColumns, kSumRows), 0, stream,
           static_cast<const float*>(workspace), static_cast<T*>(grad_weight), slots, weights);
  });
}

namespace {
void write_workspace(const ConvProblem& p, int64_t* floats) { *floats = depthwise_weight_grad_workspace(p); }
}  // namespace

FASTCONV_LAUNCHER("conv2d", "depthwise", launch_depthwise_forward);
FASTCONV_LAUNCHER("conv2d_input_grad", "depthwise", launch_depthwise_input_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad", "depthwise", launch_depthwise_weight_grad);
#if defined(FASTCONV_EMULATOR)  // launchers return nothing, so that tests ask through a pointer
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "depthwise", write_workspace);
#endif

}  // namespace fastconv::cuda
