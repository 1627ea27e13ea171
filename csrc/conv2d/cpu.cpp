// Host functions of the convolution ops on the CPU: check, describe the problem, select, launch.
#include <cstring>
#include <optional>
#include <utility>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/parallel.h"
#include "conv2d/gemm_plan.h"
#include "conv2d/select.h"
#include "depthwise/depthwise.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(conv2d_kernels)
FASTCONV_KERNEL_TABLE(depthwise_kernels)

/// Stride, padding, dilation and groups, checked; shapes are still to come.
ConvProblem problem_of(const char* op, const IntList& stride, const IntList& padding, const IntList& dilation,
                       int64_t groups) {
  ConvProblem p{};
  p.stride = size2(op, "stride", stride, 1);
  p.padding = pad4(op, padding);
  p.dilation = size2(op, "dilation", dilation, 1);
  require(groups >= 1, op, ": groups is ", groups, ", expected at least 1");
  p.groups = groups;
  return p;
}

void set_weight(const char* op, ConvProblem& p, int64_t k, int64_t r, int64_t s) {
  p.k = k, p.r = r, p.s = s;
  require(r >= 1 && s >= 1, op, ": the kernel is ", r, " x ", s, ", expected at least 1 x 1");
  require(k % p.groups == 0, op, ": ", k, " output channels are not divisible by groups = ", p.groups);
}

void set_input(const char* op, ConvProblem& p, int64_t n, int64_t c, int64_t h, int64_t w) {
  p.n = n, p.c = c, p.h = h, p.w = w;
  require(c % p.groups == 0, op, ": ", c, " input channels are not divisible by groups = ", p.groups);
  require(p.p() >= 1 && p.q() >= 1, op, ": the kernel spans ", p.dilation.h * (p.r - 1) + 1, " x ",
          p.dilation.w * (p.s - 1) + 1, ", more than the padded input, ", h + p.padding.top + p.padding.bottom, " x ",
          w + p.padding.left + p.padding.right, "; use a smaller kernel or dilation, or more padding");
}

/// Per-channel numbers in the accumulator's type, whatever type they came in.
class ChannelValues {
 public:
  ChannelValues(const char* op, const char* name, const std::optional<Tensor>& tensor, const ConvProblem& p)
      : values_(tensor ? p.k * static_cast<int64_t>(sizeof(double)) : 0), present_(tensor.has_value()) {
    if (!tensor) return;
    require_shape(op, name, *tensor, {p.k});
    require(tensor->is_cpu(), op, ": ", name, " is not on the CPU; move all tensors of the call to one device");
    const DType dtype = dtype_of(op, *tensor);
    const int64_t stride = p.k > 1 ? tensor->stride(0) : 1;
    if (p.dtype == DType::f64) fill<double>(dtype, tensor->const_data_ptr(), stride, p.k);
    else fill<float>(dtype, tensor->const_data_ptr(), stride, p.k);
  }
  const void* data() const { return present_ ? values_.as<void>() : nullptr; }

 private:
  template <class Acc>
  void fill(DType dtype, const void* source, int64_t stride, int64_t count);

  Scratch values_;
  bool present_;
};

float to_float(float value) { return value; }
double to_float(double value) { return value; }
float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
float to_float(Half value) {
  return static_cast<float>(torch::headeronly::detail::fp16_ieee_to_fp32_value(value.bits));
}

template <class Acc>
void ChannelValues::fill(DType dtype, const void* source, int64_t stride, int64_t count) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < count; ++i)
      values_.as<Acc>()[i] = static_cast<Acc>(to_float(static_cast<const T*>(source)[i * stride]));
  });
}

std::string_view algo_name(const std::optional<std::string>& algo) { return algo ? std::string_view(*algo) : ""; }

Tensor convolve(const char* op, const Tensor& input, const Tensor& weight, ConvProblem p, Activation activation,
                const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& residual, std::string_view algo) {
  require_cpu(op, "input", input, 4);
  require_cpu(op, "weight", weight, 4);
  require_same_dtype(op, input, "weight", weight);
  p.dtype = dtype_of(op, input);
  // As torch does: channels_last out if either operand is.
  p.layout = suggests_channels_last(input) || suggests_channels_last(weight) ? Layout::nhwc : Layout::nchw;
  set_weight(op, p, weight.size(0), weight.size(2), weight.size(3));
  set_input(op, p, input.size(0), input.size(1), input.size(2), input.size(3));
  require(weight.size(1) == p.c_per_group(), op, ": weight.size(1) is ", weight.size(1),
          ", expected in_channels / groups = ", p.c_per_group(), "; check groups and the input's channels");

  const Tensor x = dense(input, p.layout), w = dense(weight, p.layout);
  Tensor output = empty_output(input, p.n, p.k, p.p(), p.q(), p.layout);
  const ChannelValues scales(op, "scale", scale, p), shifts(op, "bias", shift, p);
  std::optional<Tensor> added;
  if (residual) {
    require_cpu(op, "residual", *residual, 4);
    require_same_dtype(op, input, "residual", *residual);
    require_shape(op, "residual", *residual, {p.n, p.k, p.p(), p.q()});
    added = dense(*residual, p.layout);
  }
  const Epilogue epilogue{scales.data(), shifts.data(), added ? added->const_data_ptr() : nullptr, activation};
  const Kernel kernel = select_conv2d(p, ConvPass::forward, algo);
  if (output.numel() == 0) return output;
  count_call(kernel);
  if (kernel == Kernel::depthwise) {
    depthwise_kernels()->forward(p, x.const_data_ptr(), w.const_data_ptr(), output.mutable_data_ptr(), epilogue);
    return output;
  }
  std::vector<Tap> taps;
  GemmConv product = forward_product(p, x.const_data_ptr(), w.const_data_ptr(), output.mutable_data_ptr(), taps);
  product.epilogue = epilogue;
  if (kernel == Kernel::conv2d_naive) conv2d_kernels()->naive(product, p.dtype);
  else if (kernel == Kernel::conv2d_rows) conv2d_kernels()->rows(product, p.dtype);
  else conv2d_kernels()->tiled(&product, 1, p.layout, p.dtype);
  return output;
}

Tensor conv2d(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
              IntList dilation, int64_t groups, std::optional<std::string> algo) {
  const ConvProblem p = problem_of("conv2d", stride, padding, dilation, groups);
  if (bias) require_same_dtype("conv2d", input, "bias", *bias);
  return convolve("conv2d", input, weight, p, Activation::none, std::nullopt, bias, std::nullopt, algo_name(algo));
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

Tensor conv2d_eager(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList geometry,
                    int64_t groups) {
  const Geometry g(input, weight, geometry);
  return conv2d(input, weight, std::move(bias), g.stride, g.padding, g.dilation, groups, std::nullopt);
}

Tensor conv2d_fused(const Tensor& input, const Tensor& weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                    std::optional<Tensor> residual, IntList stride, IntList padding, IntList dilation, int64_t groups,
                    int64_t activation, std::optional<std::string> algo) {
  const ConvProblem p = problem_of("conv2d_fused", stride, padding, dilation, groups);
  require(activation >= 0 && activation <= static_cast<int64_t>(Activation::tanh), "conv2d_fused: activation is ",
          activation, ", expected 0 (none), 1 (relu), 2 (relu6) or 3 (tanh)");
  return convolve("conv2d_fused", input, weight, p, static_cast<Activation>(activation), scale, shift, residual,
                  algo_name(algo));
}

Tensor conv2d_fused_eager(const Tensor& input, const Tensor& weight, std::optional<Tensor> scale,
                          std::optional<Tensor> shift, std::optional<Tensor> residual, IntList geometry, int64_t groups,
                          int64_t activation) {
  const Geometry g(input, weight, geometry);
  return conv2d_fused(input, weight, std::move(scale), std::move(shift), std::move(residual), g.stride, g.padding,
                      g.dilation, groups, activation, std::nullopt);
}

Tensor conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, IntList input_size, IntList stride,
                         IntList padding, IntList dilation, int64_t groups, std::optional<std::string> algo) {
  const char* op = "conv2d_input_grad";
  ConvProblem p = problem_of(op, stride, padding, dilation, groups);
  require_cpu(op, "grad_output", grad_output, 4);
  require_cpu(op, "weight", weight, 4);
  require_same_dtype(op, grad_output, "weight", weight);
  p.dtype = dtype_of(op, grad_output);
  p.layout = suggests_channels_last(grad_output) || suggests_channels_last(weight) ? Layout::nhwc : Layout::nchw;
  const Size2 size = size2(op, "input_size", input_size, 0);
  set_weight(op, p, weight.size(0), weight.size(2), weight.size(3));
  set_input(op, p, grad_output.size(0), weight.size(1) * groups, size.h, size.w);
  require_shape(op, "grad_output", grad_output, {p.n, p.k, p.p(), p.q()});

  const Tensor grad = dense(grad_output, p.layout), w = dense(weight, p.layout);
  Tensor grad_input = empty_output(grad_output, p.n, p.c, p.h, p.w, p.layout);
  const Kernel kernel = select_conv2d(p, ConvPass::input_grad, algo_name(algo));
  if (grad_input.numel() == 0) return grad_input;
  count_call(kernel);
  if (kernel == Kernel::depthwise_input_grad) {
    depthwise_kernels()->input_grad(p, grad.const_data_ptr(), w.const_data_ptr(), grad_input.mutable_data_ptr());
    return grad_input;
  }
  const int64_t rows = min_of(p.stride.h, p.h), columns = min_of(p.stride.w, p.w);
  std::vector<std::vector<Tap>> taps(static_cast<std::size_t>(rows * columns));
  std::vector<GemmConv> phases;
  phases.reserve(taps.size());
  for (int64_t a = 0; a < rows; ++a)
    for (int64_t b = 0; b < columns; ++b)
      phases.push_back(input_grad_product(p, {a, b}, grad.const_data_ptr(), w.const_data_ptr(),
                                          grad_input.mutable_data_ptr(), taps[phases.size()]));
  if (kernel == Kernel::conv2d_input_grad_tiled) {
    conv2d_kernels()->tiled(phases.data(), static_cast<int64_t>(phases.size()), p.layout, p.dtype);
    return grad_input;
  }
  for (const GemmConv& phase : phases)
    (kernel == Kernel::conv2d_input_grad_rows ? conv2d_kernels()->rows : conv2d_kernels()->naive)(phase, p.dtype);
  return grad_input;
}

Tensor conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, IntList kernel_size, IntList stride,
                          IntList padding, IntList dilation, int64_t groups, std::optional<std::string> algo) {
  const char* op = "conv2d_weight_grad";
  ConvProblem p = problem_of(op, stride, padding, dilation, groups);
  require_cpu(op, "grad_output", grad_output, 4);
  require_cpu(op, "input", input, 4);
  require_same_dtype(op, input, "grad_output", grad_output);
  p.dtype = dtype_of(op, input);
  p.layout = suggests_channels_last(grad_output) || suggests_channels_last(input) ? Layout::nhwc : Layout::nchw;
  const Size2 size = size2(op, "kernel_size", kernel_size, 1);
  set_weight(op, p, grad_output.size(1), size.h, size.w);
  set_input(op, p, input.size(0), input.size(1), input.size(2), input.size(3));
  require_shape(op, "grad_output", grad_output, {p.n, p.k, p.p(), p.q()});

  const Tensor grad = dense(grad_output, p.layout), x = dense(input, p.layout);
  Tensor grad_weight = empty_output(input, p.k, p.c_per_group(), p.r, p.s, p.layout);
  const Kernel kernel = select_conv2d(p, ConvPass::weight_grad, algo_name(algo));
  if (grad_weight.numel() == 0) return grad_weight;
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_weight);
    return grad_weight;
  }
  count_call(kernel);
  if (kernel == Kernel::depthwise_weight_grad) {
    depthwise_kernels()->weight_grad(p, grad.const_data_ptr(), x.const_data_ptr(), grad_weight.mutable_data_ptr());
    return grad_weight;
  }
  std::vector<Tap> taps;
  const GemmWeightGrad product =
      weight_grad_product(p, grad.const_data_ptr(), x.const_data_ptr(), grad_weight.mutable_data_ptr(), taps);
  if (kernel == Kernel::conv2d_weight_grad_naive) conv2d_kernels()->naive_weight_grad(product, p.dtype);
  else conv2d_kernels()->tiled_weight_grad(product, p.dtype);
  return grad_weight;
}

Tensor conv2d_bias_grad(const Tensor& grad_output) {
  const char* op = "conv2d_bias_grad";
  require_cpu(op, "grad_output", grad_output, 4);
  const Layout layout = layout_of(grad_output);
  const Tensor grad = dense(grad_output, layout);
  const int64_t k = grad.size(1);
  Tensor grad_bias = torch::stable::new_empty(grad, {&k, 1});
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_bias);
    return grad_bias;
  }
  count_call(Kernel::conv2d_bias_grad);
  conv2d_kernels()->bias_grad(grad.const_data_ptr(), grad_bias.mutable_data_ptr(), grad.size(0), k,
                              grad.size(2) * grad.size(3), layout, dtype_of(op, grad));
  return grad_bias;
}

}  // namespace
}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&fastconv::conv2d));
  m.impl("conv2d.eager", TORCH_BOX(&fastconv::conv2d_eager));
  m.impl("conv2d_fused", TORCH_BOX(&fastconv::conv2d_fused));
  m.impl("conv2d_fused.eager", TORCH_BOX(&fastconv::conv2d_fused_eager));
  m.impl("conv2d_input_grad", TORCH_BOX(&fastconv::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&fastconv::conv2d_weight_grad));
  m.impl("conv2d_bias_grad", TORCH_BOX(&fastconv::conv2d_bias_grad));
}
