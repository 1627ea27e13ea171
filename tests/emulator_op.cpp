// A torch op over an emulated kernel, written as csrc/<family>/cuda.cpp is: the proof that one host function serves the
// GPU and the emulator.
#include "cuda_support/host.h"

namespace fastconv::cuda {

void launch_scale(const PoolProblem& p, const void* x, void* y, double factor, cudaStream_t stream);

namespace {

Tensor scale(const Tensor& input, double factor) {
  require_rank("scale", "input", input, 4);
  const OnDevice device(input);
  const Layout layout = layout_of(input);
  PoolProblem p{};
  p.n = input.size(0), p.c = input.size(1), p.h = input.size(2), p.w = input.size(3);
  p.dtype = dtype_of("scale", input);
  const Tensor x = dense(input, layout);
  Tensor output = torch::stable::empty_like(x);
  launch_scale(p, x.const_data_ptr(), output.mutable_data_ptr(), factor, device.stream());
  return output;
}

}  // namespace
}  // namespace fastconv::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastconv_emulated, m) { m.def("scale(Tensor input, float factor) -> Tensor"); }

FASTCONV_CUDA_LIBRARY(m) { m.impl("scale", TORCH_BOX(&fastconv::cuda::scale)); }
