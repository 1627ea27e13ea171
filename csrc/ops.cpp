// The list of ops: every operator schema of the package. Kernels register themselves beside their host functions
// (csrc/<family>/cpu.cpp, cuda.cpp); fakes and autograd are in fastconv/ops/<family>.py.
//
// Conventions: tensors are (N, C, H, W) in either memory format; padding is (top, left, bottom, right); stride,
// dilation and kernel are (height, width); `algo` names a kernel of the registry, None lets the selection choose.

#include <torch/csrc/stable/library.h>

// The library of emulated CUDA kernels has ops of the same names and schemas in a namespace of its own.
#if defined(FASTCONV_EMULATOR)
STABLE_TORCH_LIBRARY(fastconv_emulated, m) {
#else
STABLE_TORCH_LIBRARY(fastconv, m) {
#endif
  // conv2d: y = bias + input * weight
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, int groups, "
      "str? algo) -> Tensor");
  // Overloads named "eager" are the same kernels for calls that need no autograd, fake or vmap (fastconv/_eager.py). A
  // list costs half a microsecond to pass, so that stride, padding and dilation travel as one.
  m.def("conv2d.eager(Tensor input, Tensor weight, Tensor? bias, int[8] geometry, int groups) -> Tensor");
  // y = activation(scale * (input * weight) + shift + residual); scale and shift are (K), float32 (float64 for float64)
  m.def(
      "conv2d_fused(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[2] stride, "
      "int[4] padding, int[2] dilation, int groups, int activation, str? algo) -> Tensor");
  m.def(
      "conv2d_fused.eager(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[8] "
      "geometry, int groups, int activation, Tensor? packed=None) -> Tensor");
  // The weight in the form of the kernel called `algo`, winograd (F(tile x tile), 2 or 4) or (channels_last) tiled, for
  // the `packed` of this one: on the CPU. The caller answers for its being of this weight, and of the kernel that will
  // be chosen.
  m.def(
      "conv2d_pack(Tensor weight, int[8] geometry, int groups, bool channels_last, str algo, int tile=4) -> "
      "Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad_output, Tensor weight, SymInt[2] input_size, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, str? algo) -> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad_output, Tensor input, SymInt[2] kernel_size, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, str? algo) -> Tensor");
  m.def("conv2d_bias_grad(Tensor grad_output) -> Tensor");

  // Offsets number the taps of a window row by row: uint8 for windows of up to 255 taps, int32 beyond.
  m.def(
      "max_pool2d(Tensor input, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> "
      "Tensor");
  // window: kernel, stride, padding, dilation
  m.def("max_pool2d.eager(Tensor input, int[8] window, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool2d_with_offsets(Tensor input, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool "
      "ceil_mode) -> (Tensor, Tensor)");
  // torch's int64 indices into the flattened (H, W) plane
  m.def(
      "max_pool2d_indices(Tensor offsets, SymInt[2] input_size, int[2] kernel, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  // Picks input at the offsets; the adjoint of max_pool2d_backward.
  m.def(
      "max_pool2d_gather(Tensor input, Tensor offsets, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) "
      "-> Tensor");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[2] input_size, int[2] kernel, int[2] stride, "
      "int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "avg_pool2d(Tensor input, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, "
      "int? divisor_override) -> Tensor");
  // window: kernel, stride, padding
  m.def(
      "avg_pool2d.eager(Tensor input, int[6] window, bool ceil_mode, bool count_include_pad, int? divisor_override) -> "
      "Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size, int[2] kernel, int[2] stride, int[2] padding, "
      "bool "
      "ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, SymInt[2] output_size) -> Tensor");
  m.def("adaptive_avg_pool2d.eager(Tensor input, int[2] output_size) -> Tensor");
  m.def("adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size) -> Tensor");

  // y = x * d^-beta with d = k + alpha / size * (sum of x^2 over `size` neighbouring channels)
  m.def("local_response_norm(Tensor input, int size, float alpha, float beta, float k) -> Tensor");
  m.def("local_response_norm_jvp(Tensor input, Tensor tangent, int size, float alpha, float beta, float k) -> Tensor");
  m.def(
      "local_response_norm_backward(Tensor grad_output, Tensor input, int size, float alpha, float beta, float k) -> "
      "Tensor");

  // The layers of a fused network, as csrc/network/network.h describes them, on tensors: its inputs, then its outputs,
  // which are written. Of no use but to fastconv/_network.py, in plain eager inference.
  m.def("network(Tensor program, Tensor[] tensors, Tensor[] constants, Tensor workspace) -> ()");

  // Calls per kernel since the last reset, in the registry's order: of CPU kernels, and of CUDA kernels.
  m.def("kernel_counts() -> Tensor");
  m.def("reset_kernel_counts() -> ()");
  m.def("cuda_kernel_counts() -> Tensor");
  m.def("reset_cuda_kernel_counts() -> ()");
  m.def("cuda_runtime_version() -> int");  // 13000 for CUDA 13.0: what _C_cuda is linked with
}
