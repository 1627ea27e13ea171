// Host functions of local response normalisation on any device: check the operands, describe the problem, allocate the
// result. What is left to a device (cpu.cpp, cuda.cpp) is a class with forward(problem, x, y), jvp(problem, x, tangent,
// y_tangent) and backward(problem, grad, x, grad_input); their tensors are dense in the problem's layout, and not
// empty.
#pragma once

#include "common/checks.h"
#include "norm/norm.h"

namespace fastconv {

template <class Device>
struct NormOps {
  static NormProblem problem_of(const char* op, const Tensor& input, int64_t size, double alpha, double beta,
                                double k) {
    require_rank(op, "input", input, 4);
    require(size >= 1, op, ": size is ", size, ", expected at least 1 channel");
    NormProblem p{};
    p.n = input.size(0), p.c = input.size(1), p.plane = input.size(2) * input.size(3);
    p.size = size;
    p.scale = alpha / static_cast<double>(size), p.beta = beta, p.k = k;
    p.layout = layout_of(input);
    p.dtype = dtype_of(op, input);
    return p;
  }

  static Tensor empty_result(const Tensor& input, const NormProblem& p) {
    return empty_output(input, p.n, p.c, input.size(2), input.size(3), p.layout);
  }

  /// The other operand of a derivative: of the input's device, shape and dtype, and dense in its layout.
  static Tensor companion(const char* op, const char* name, const Tensor& tensor, const Tensor& input, Layout layout) {
    require_rank(op, name, tensor, 4);
    require_same_device(op, input, name, tensor);
    require_same_dtype(op, input, name, tensor);
    require_shape(op, name, tensor, {input.size(0), input.size(1), input.size(2), input.size(3)});
    return dense(tensor, layout);
  }

  static Tensor forward(const Tensor& input, int64_t size, double alpha, double beta, double k) {
    const NormProblem p = problem_of("local_response_norm", input, size, alpha, beta, k);
    const Tensor x = dense(input, p.layout);
    Tensor output = empty_result(input, p);
    if (output.numel() != 0) Device::forward(p, x, output);
    return output;
  }

  static Tensor jvp(const Tensor& input, const Tensor& tangent, int64_t size, double alpha, double beta, double k) {
    const char* op = "local_response_norm_jvp";
    const NormProblem p = problem_of(op, input, size, alpha, beta, k);
    const Tensor x = dense(input, p.layout), v = companion(op, "tangent", tangent, input, p.layout);
    Tensor output = empty_result(input, p);
    if (output.numel() != 0) Device::jvp(p, x, v, output);
    return output;
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha, double beta,
                         double k) {
    const char* op = "local_response_norm_backward";
    const NormProblem p = problem_of(op, input, size, alpha, beta, k);
    const Tensor x = dense(input, p.layout), grad = companion(op, "grad_output", grad_output, input, p.layout);
    Tensor grad_input = empty_result(input, p);
    if (grad_input.numel() != 0) Device::backward(p, grad, x, grad_input);
    return grad_input;
  }

  template <class Library>
  static void add_to(Library& m) {
    m.impl("local_response_norm", TORCH_BOX(&NormOps::forward));
    m.impl("local_response_norm_jvp", TORCH_BOX(&NormOps::jvp));
    m.impl("local_response_norm_backward", TORCH_BOX(&NormOps::backward));
  }
};

}  // namespace fastconv
