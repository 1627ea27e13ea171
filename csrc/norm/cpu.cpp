// Host functions of local response normalisation on the CPU: check, describe the problem, launch.
#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/registry.h"
#include "norm/norm.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(norm_kernels)

NormProblem problem_of(const char* op, const Tensor& input, int64_t size, double alpha, double beta, double k) {
  require_cpu(op, "input", input, 4);
  require(size >= 1, op, ": size is ", size, ", expected at least 1 channel");
  NormProblem p{};
  p.n = input.size(0), p.c = input.size(1), p.plane = input.size(2) * input.size(3);
  p.size = size;
  p.scale = alpha / static_cast<double>(size), p.beta = beta, p.k = k;
  p.layout = layout_of(input);
  p.dtype = dtype_of(op, input);
  return p;
}

Tensor empty_result(const Tensor& input, const NormProblem& p) {
  return empty_output(input, p.n, p.c, input.size(2), input.size(3), p.layout);
}

/// The other operand of a derivative: of the input's shape and dtype, and dense in its layout.
Tensor companion(const char* op, const char* name, const Tensor& tensor, const Tensor& input, Layout layout) {
  require_cpu(op, name, tensor, 4);
  require_same_dtype(op, input, name, tensor);
  require_shape(op, name, tensor, {input.size(0), input.size(1), input.size(2), input.size(3)});
  return dense(tensor, layout);
}

Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  const NormProblem p = problem_of("local_response_norm", input, size, alpha, beta, k);
  const Tensor x = dense(input, p.layout);
  Tensor output = empty_result(input, p);
  if (output.numel() == 0) return output;
  count_call(Kernel::local_response_norm);
  norm_kernels()->forward(p, x.const_data_ptr(), output.mutable_data_ptr());
  return output;
}

Tensor local_response_norm_jvp(const Tensor& input, const Tensor& tangent, int64_t size, double alpha, double beta,
                               double k) {
  const char* op = "local_response_norm_jvp";
  const NormProblem p = problem_of(op, input, size, alpha, beta, k);
  const Tensor x = dense(input, p.layout), v = companion(op, "tangent", tangent, input, p.layout);
  Tensor output = empty_result(input, p);
  if (output.numel() == 0) return output;
  count_call(Kernel::local_response_norm_jvp);
  norm_kernels()->jvp(p, x.const_data_ptr(), v.const_data_ptr(), output.mutable_data_ptr());
  return output;
}

Tensor local_response_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha,
                                    double beta, double k) {
  const char* op = "local_response_norm_backward";
  const NormProblem p = problem_of(op, input, size, alpha, beta, k);
  const Tensor x = dense(input, p.layout), grad = companion(op, "grad_output", grad_output, input, p.layout);
  Tensor grad_input = empty_result(input, p);
  if (grad_input.numel() == 0) return grad_input;
  count_call(Kernel::local_response_norm_backward);
  norm_kernels()->backward(p, grad.const_data_ptr(), x.const_data_ptr(), grad_input.mutable_data_ptr());
  return grad_input;
}

}  // namespace
}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&fastconv::local_response_norm));
  m.impl("local_response_norm_jvp", TORCH_BOX(&fastconv::local_response_norm_jvp));
  m.impl("local_response_norm_backward", TORCH_BOX(&fastconv::local_response_norm_backward));
}
