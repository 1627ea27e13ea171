// Host functions of the convolution ops on any device: check the operands, describe the problem, choose a kernel,
// allocate the result. What is left to a device (cpu.cpp, cuda.cpp) is a class with
//
//   select(problem, pass, algo)                          the kernel, by its device's enumeration
//   forward(kernel, problem, x, weight, fused, y)        and input_grad, weight_grad, bias_grad
//   kPacks                                               true if it has select_packed(problem), for forward with
//                                                        fused.packed, and pack(problem, weight, algo, tile), for that
//
// All tensors that it gets are dense in the problem's layout, on one device, and none of them is empty.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "common/checks.h"
#include "conv2d/candidates.h"

namespace fastconv {

/// What happens to the sums before they are stored: y = activation(scale * sum + shift + residual).
struct FusedOperands {
  const std::optional<Tensor>& scale;  // (K), of any of the dtypes and any stride
  const std::optional<Tensor>& shift;  // likewise
  std::optional<Tensor> residual;      // as the output
  Activation activation = Activation::none;
  const Tensor* packed = nullptr;  // what Device::pack made of the weight
};

/// Stride, padding, dilation and groups, checked; shapes are still to come.
inline ConvProblem conv_problem(const char* op, const IntList& stride, const IntList& padding, const IntList& dilation,
                                int64_t groups) {
  ConvProblem p{};
  p.stride = size2(op, "stride", stride, 1);
  p.padding = pad4(op, padding);
  p.dilation = size2(op, "dilation", dilation, 1);
  require(groups >= 1, op, ": groups is ", groups, ", expected at least 1");
  p.groups = groups;
  return p;
}

inline void set_weight(const char* op, ConvProblem& p, int64_t k, int64_t r, int64_t s) {
  p.k = k, p.r = r, p.s = s;
  require(r >= 1 && s >= 1 && r <= kLargestStep && s <= kLargestStep, op, ": the kernel is ", r, " x ", s,
          ", expected at least 1 x 1 and at most ", kLargestStep, " either way");
  require(k % p.groups == 0, op, ": ", k, " output channels are not divisible by groups = ", p.groups);
}

inline void set_input(const char* op, ConvProblem& p, int64_t n, int64_t c, int64_t h, int64_t w) {
  p.n = n, p.c = c, p.h = h, p.w = w;
  require(c % p.groups == 0, op, ": ", c, " input channels are not divisible by groups = ", p.groups);
  require(p.p() >= 1 && p.q() >= 1, op, ": the kernel spans ", p.dilation.h * (p.r - 1) + 1, " x ",
          p.dilation.w * (p.s - 1) + 1, ", more than the padded input, ", h + p.padding.top + p.padding.bottom, " x ",
          w + p.padding.left + p.padding.right, "; use a smaller kernel or dilation, or more padding");
}

/// Two operands of one device and dtype; the result is channels_last if either of them is, as torch has it.
inline void set_operands(const char* op, ConvProblem& p, const char* first_name, const Tensor& first,
                         const char* second_name, const Tensor& second) {
  require_rank(op, first_name, first, 4);
  require_rank(op, second_name, second, 4);
  require_same_device(op, first, second_name, second);
  require_same_dtype(op, first, second_name, second);
  p.dtype = dtype_of(op, first);
  p.layout = suggests_channels_last(first) || suggests_channels_last(second) ? Layout::nhwc : Layout::nchw;
}

/// Stride, padding and dilation, which travel as one list on the short way. It leaves empty tensors to the long one:
/// torch treats them case by case.
struct Geometry {
  IntList stride, padding, dilation;

  Geometry(const Tensor& input, const Tensor& weight, const IntList& numbers) {
    require(input.numel() > 0 && weight.numel() > 0, "fastconv: input or weight is empty; call the default overload");
    require(numbers.size() == 8, "fastconv: geometry has ", numbers.size(), " values, expected 8");
    const auto begin = numbers.begin();
    stride.assign(begin, begin + 2), padding.assign(begin + 2, begin + 6), dilation.assign(begin + 6, begin + 8);
  }
};

template <class Device>
struct Conv2dOps {
  using Algo = std::optional<std::string>;
  using MaybeTensor = std::optional<Tensor>;

  static std::string_view name(const Algo& algo) { return algo ? std::string_view(*algo) : ""; }

  static void check_channels(const char* op, const char* name, const Tensor& input, const MaybeTensor& values,
                             int64_t k) {
    if (!values) return;
    require_shape(op, name, *values, {k});
    require_same_device(op, input, name, *values);
    dtype_of(op, *values);
  }

  static Tensor convolve(const char* op, const Tensor& input, const Tensor& weight, ConvProblem p,
                         Activation activation, const MaybeTensor& scale, const MaybeTensor& shift,
                         const MaybeTensor& residual, std::string_view algo, const MaybeTensor& packed = std::nullopt) {
    set_operands(op, p, "input", input, "weight", weight);
    set_weight(op, p, weight.size(0), weight.size(2), weight.size(3));
    set_input(op, p, input.size(0), input.size(1), input.size(2), input.size(3));
    require(weight.size(1) == p.c_per_group(), op, ": weight.size(1) is ", weight.size(1),
            ", expected in_channels / groups = ", p.c_per_group(), "; check groups and the input's channels");
    check_channels(op, "scale", input, scale, p.k);
    check_channels(op, "bias", input, shift, p.k);
    FusedOperands fused{scale, shift, std::nullopt, activation, packed ? &*packed : nullptr};
    if (residual) {
      require_rank(op, "residual", *residual, 4);
      require_same_device(op, input, "residual", *residual);
      require_same_dtype(op, input, "residual", *residual);
      require_shape(op, "residual", *residual, {p.n, p.k, p.p(), p.q()});
      fused.residual = dense(*residual, p.layout);
    }
    const Tensor x = dense(input, p.layout), w = dense(weight, p.layout);
    Tensor output = empty_output(input, p.n, p.k, p.p(), p.q(), p.layout);
    const auto kernel = select_forward(p, algo, packed);
    if (output.numel() != 0) Device::forward(kernel, p, x, w, fused, output);
    return output;
  }

  static auto select_forward(const ConvProblem& p, std::string_view algo, const MaybeTensor& packed) {
    if constexpr (Device::kPacks)
      if (packed) return Device::select_packed(p);
    return Device::select(p, ConvPass::forward, algo);
  }

  /// The weight in the form that kernels for frozen weights read, for conv2d_fused.eager.
  static Tensor pack(const Tensor& weight, IntList geometry, int64_t groups, bool channels_last, std::string algo,
                     int64_t tile) {
    const char* op = "conv2d_pack";
    const Geometry g(weight, weight, geometry);
    require(tile == 2 || tile == 4, op, ": tile is ", tile, ", expected 2 or 4 (rows of outputs)");
    ConvProblem p = conv_problem(op, g.stride, g.padding, g.dilation, groups);
    require_rank(op, "weight", weight, 4);
    p.dtype = dtype_of(op, weight);
    p.layout = channels_last ? Layout::nhwc : Layout::nchw;
    p.c = weight.size(1) * groups;
    set_weight(op, p, weight.size(0), weight.size(2), weight.size(3));
    return Device::pack(p, dense(weight, p.layout), algo, tile);
  }

  static Tensor conv2d(const Tensor& input, const Tensor& weight, MaybeTensor bias, IntList stride, IntList padding,
                       IntList dilation, int64_t groups, Algo algo) {
    const ConvProblem p = conv_problem("conv2d", stride, padding, dilation, groups);
    if (bias) require_same_dtype("conv2d", input, "bias", *bias);
    return convolve("conv2d", input, weight, p, Activation::none, std::nullopt, bias, std::nullopt, name(algo));
  }

  static Tensor conv2d_eager(const Tensor& input, const Tensor& weight, MaybeTensor bias, IntList geometry,
                             int64_t groups) {
    const Geometry g(input, weight, geometry);
    return conv2d(input, weight, std::move(bias), g.stride, g.padding, g.dilation, groups, std::nullopt);
  }

  static Tensor conv2d_fused(const Tensor& input, const Tensor& weight, MaybeTensor scale, MaybeTensor shift,
                             MaybeTensor residual, IntList stride, IntList padding, IntList dilation, int64_t groups,
                             int64_t activation, Algo algo) {
    return fused(input, weight, scale, shift, residual, stride, padding, dilation, groups, activation, name(algo),
                 std::nullopt);
  }

  static Tensor fused(const Tensor& input, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                      const MaybeTensor& residual, const IntList& stride, const IntList& padding,
                      const IntList& dilation, int64_t groups, int64_t activation, std::string_view algo,
                      const MaybeTensor& packed) {
    const ConvProblem p = conv_problem("conv2d_fused", stride, padding, dilation, groups);
    require(activation >= 0 && activation <= static_cast<int64_t>(Activation::tanh), "conv2d_fused: activation is ",
            activation, ", expected 0 (none), 1 (relu), 2 (relu6) or 3 (tanh)");
    return convolve("conv2d_fused", input, weight, p, static_cast<Activation>(activation), scale, shift, residual, algo,
                    packed);
  }

  static Tensor conv2d_fused_eager(const Tensor& input, const Tensor& weight, MaybeTensor scale, MaybeTensor shift,
                                   MaybeTensor residual, IntList geometry, int64_t groups, int64_t activation,
                                   MaybeTensor packed) {
    const Geometry g(input, weight, geometry);
    return fused(input, weight, scale, shift, residual, g.stride, g.padding, g.dilation, groups, activation, "",
                 packed);
  }

  static Tensor input_grad(const Tensor& grad_output, const Tensor& weight, IntList input_size, IntList stride,
                           IntList padding, IntList dilation, int64_t groups, Algo algo) {
    const char* op = "conv2d_input_grad";
    ConvProblem p = conv_problem(op, stride, padding, dilation, groups);
    set_operands(op, p, "grad_output", grad_output, "weight", weight);
    const Size2 size = size2(op, "input_size", input_size, 0, INT64_MAX);
    set_weight(op, p, weight.size(0), weight.size(2), weight.size(3));
    set_input(op, p, grad_output.size(0), weight.size(1) * groups, size.h, size.w);
    require_shape(op, "grad_output", grad_output, {p.n, p.k, p.p(), p.q()});

    const Tensor grad = dense(grad_output, p.layout), w = dense(weight, p.layout);
    Tensor grad_input = empty_output(grad_output, p.n, p.c, p.h, p.w, p.layout);
    const auto kernel = Device::select(p, ConvPass::input_grad, name(algo));
    if (grad_input.numel() != 0) Device::input_grad(kernel, p, grad, w, grad_input);
    return grad_input;
  }

  static Tensor weight_grad(const Tensor& grad_output, const Tensor& input, IntList kernel_size, IntList stride,
                            IntList padding, IntList dilation, int64_t groups, Algo algo) {
    const char* op = "conv2d_weight_grad";
    ConvProblem p = conv_problem(op, stride, padding, dilation, groups);
    set_operands(op, p, "grad_output", grad_output, "input", input);
    const Size2 size = size2(op, "kernel_size", kernel_size, 1);
    set_weight(op, p, grad_output.size(1), size.h, size.w);
    set_input(op, p, input.size(0), input.size(1), input.size(2), input.size(3));
    require_shape(op, "grad_output", grad_output, {p.n, p.k, p.p(), p.q()});

    const Tensor grad = dense(grad_output, p.layout), x = dense(input, p.layout);
    Tensor grad_weight = empty_output(input, p.k, p.c_per_group(), p.r, p.s, p.layout);
    const auto kernel = Device::select(p, ConvPass::weight_grad, name(algo));
    if (grad_weight.numel() == 0) return grad_weight;
    if (grad.numel() == 0) torch::stable::zero_(grad_weight);
    else Device::weight_grad(kernel, p, grad, x, grad_weight);
    return grad_weight;
  }

  static Tensor bias_grad(const Tensor& grad_output) {
    const char* op = "conv2d_bias_grad";
    require_rank(op, "grad_output", grad_output, 4);
    const Layout layout = layout_of(grad_output);
    const DType dtype = dtype_of(op, grad_output);
    const Tensor grad = dense(grad_output, layout);
    const int64_t k = grad.size(1);
    Tensor grad_bias = torch::stable::new_empty(grad, {&k, 1});
    if (grad.numel() == 0) torch::stable::zero_(grad_bias);
    else Device::bias_grad(grad, grad.size(0), k, grad.size(2) * grad.size(3), layout, dtype, grad_bias);
    return grad_bias;
  }

  template <class Library>
  static void add_to(Library& m) {
    m.impl("conv2d", TORCH_BOX(&Conv2dOps::conv2d));
    m.impl("conv2d.eager", TORCH_BOX(&Conv2dOps::conv2d_eager));
    m.impl("conv2d_fused", TORCH_BOX(&Conv2dOps::conv2d_fused));
    m.impl("conv2d_fused.eager", TORCH_BOX(&Conv2dOps::conv2d_fused_eager));
    if constexpr (Device::kPacks) m.impl("conv2d_pack", TORCH_BOX(&Conv2dOps::pack));
    m.impl("conv2d_input_grad", TORCH_BOX(&Conv2dOps::input_grad));
    m.impl("conv2d_weight_grad", TORCH_BOX(&Conv2dOps::weight_grad));
    m.impl("conv2d_bias_grad", TORCH_BOX(&Conv2dOps::bias_grad));
  }
};

}  // namespace fastconv
