// The convolution ops on the CPU: kernels chosen by select.h, through the table of the active instruction set.
#include <cstring>
#include <optional>
#include <vector>

#include "common/kernel_table.h"
#include "common/parallel.h"
#include "conv2d/cpu_call.h"
#include "conv2d/gemm_plan.h"
#include "conv2d/host.h"
#include "conv2d/select.h"
#include "depthwise/depthwise.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(conv2d_kernels)
FASTCONV_KERNEL_TABLE(depthwise_kernels)

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

/// Per-channel numbers in the accumulator's type, whatever type they came in.
class ChannelValues {
 public:
  ChannelValues(const char* op, const std::optional<Tensor>& tensor, const ConvProblem& p)
      : values_(tensor ? p.k * static_cast<int64_t>(sizeof(double)) : 0), present_(tensor.has_value()) {
    if (!tensor) return;
    const DType dtype = dtype_of(op, *tensor);
    const int64_t stride = p.k > 1 ? tensor->stride(0) : 1;
    if (p.dtype == DType::f64) fill<double>(dtype, tensor->const_data_ptr(), stride, p.k);
    else fill<float>(dtype, tensor->const_data_ptr(), stride, p.k);
  }
  const void* data() const { return present_ ? values_.as<void>() : nullptr; }

 private:
  template <class Acc>
  void fill(DType dtype, const void* source, int64_t stride, int64_t count) {
    dispatch(dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < count; ++i)
        values_.as<Acc>()[i] = static_cast<Acc>(to_float(static_cast<const T*>(source)[i * stride]));
    });
  }

  Scratch values_;
  bool present_;
};

struct CpuConv2d {
  static constexpr bool kPacks = true;

  static CpuChoice select(const ConvProblem& p, ConvPass pass, std::string_view algo) {
    return choose_conv2d(p, pass, algo);
  }

  static CpuChoice select_packed(const ConvProblem& p) { return choose_packed_conv2d(p); }

  static Tensor pack(ConvProblem p, const Tensor& weight, std::string_view algo, int64_t tile) {
    const auto form = static_cast<WinogradForm>(tile);
    p = image_for_weight(p);
    require(algo == "winograd" || algo == "tiled", "conv2d_pack: algo is \"", algo, "\", expected winograd or tiled");
    const Kernel kernel = algo == "tiled" ? Kernel::conv2d_tiled : Kernel::conv2d_winograd;
    const int64_t bytes = packed_bytes(p, kernel, form);
    const char* reason = refuse_keeping(p, kernel);
    require(bytes > 0, "conv2d_pack: ", algo, " keeps no form of this weight: ", reason ? reason : "");
    Tensor packed = torch::stable::empty({&bytes, 1}, torch::headeronly::ScalarType::Byte);
    pack_weight(p, kernel, form, weight.const_data_ptr(), packed.mutable_data_ptr());
    return packed;
  }

  static void forward(const CpuChoice& choice, const ConvProblem& p, const Tensor& x, const Tensor& weight,
                      const FusedOperands& fused, Tensor& y) {
    const ChannelValues scales("conv2d", fused.scale, p), shifts("conv2d", fused.shift, p);
    const Epilogue epilogue{scales.data(), shifts.data(), fused.residual ? fused.residual->const_data_ptr() : nullptr,
                            fused.activation};
    const void* packed = nullptr;
    if (fused.packed) {
      require(fused.packed->is_cpu() && fused.packed->is_contiguous() &&
                  fused.packed->scalar_type() == torch::headeronly::ScalarType::Byte,
              "conv2d_fused: packed is expected to be what conv2d_pack gave");
      packed = fused.packed->const_data_ptr();
      check_packed(p, choice.kernel, packed, fused.packed->numel());
    }
    convolve(p, choice, x.const_data_ptr(), weight.const_data_ptr(), packed, epilogue, y.mutable_data_ptr());
  }

  static void input_grad(const CpuChoice& choice, const ConvProblem& p, const Tensor& grad, const Tensor& weight,
                         Tensor& grad_input) {
    if (choice.kernel == Kernel::depthwise_input_grad) {
      count_call(choice.kernel);
      depthwise_kernels()->input_grad(p, grad.const_data_ptr(), weight.const_data_ptr(), grad_input.mutable_data_ptr());
      return;
    }
    const int64_t rows = min_of(p.stride.h, p.h), columns = min_of(p.stride.w, p.w);
    std::vector<std::vector<Tap>> taps(static_cast<std::size_t>(rows * columns));
    std::vector<GemmConv> phases;
    phases.reserve(taps.size());
    for (int64_t a = 0; a < rows; ++a)
      for (int64_t b = 0; b < columns; ++b)
        phases.push_back(input_grad_product(p, {a, b}, grad.const_data_ptr(), weight.const_data_ptr(),
                                            grad_input.mutable_data_ptr(), taps[phases.size()]));
    const KeptWeight none{WinogradCost(p, ConvPass::input_grad, false).form(), nullptr};
    if (phases.size() == 1) return run_choice(choice, phases[0], p.layout, p.dtype, none);
    count_call(choice.kernel);
    if (choice.kernel == Kernel::conv2d_input_grad_tiled) {
      conv2d_kernels()->tiled(phases.data(), static_cast<int64_t>(phases.size()), p.layout, p.dtype, nullptr);
      return;
    }
    if (choice.kernel == Kernel::conv2d_input_grad_pairs) {
      pair_kernels().convolve(phases.data(), static_cast<int64_t>(phases.size()), p.layout);
      return;
    }
    for (const GemmConv& phase : phases) run_product(choice.kernel, phase, p.layout, p.dtype, none);
  }

  static void weight_grad(const CpuChoice& choice, const ConvProblem& p, const Tensor& grad, const Tensor& x,
                          Tensor& grad_weight) {
    const Kernel kernel = choice.kernel;
    count_call(kernel);
    if (kernel == Kernel::depthwise_weight_grad) {
      depthwise_kernels()->weight_grad(p, grad.const_data_ptr(), x.const_data_ptr(), grad_weight.mutable_data_ptr());
      return;
    }
    std::vector<Tap> taps;
    const GemmWeightGrad product =
        weight_grad_product(p, grad.const_data_ptr(), x.const_data_ptr(), grad_weight.mutable_data_ptr(), taps);
    if (kernel == Kernel::conv2d_weight_grad_pairs) pair_kernels().weight_grad(product);
    else if (kernel == Kernel::conv2d_weight_grad_naive) conv2d_kernels()->naive_weight_grad(product, p.dtype);
    else conv2d_kernels()->tiled_weight_grad(product, p.dtype);
  }

  static void bias_grad(const Tensor& grad, int64_t n, int64_t k, int64_t plane, Layout layout, DType dtype,
                        Tensor& grad_bias) {
    count_call(Kernel::conv2d_bias_grad);
    conv2d_kernels()->bias_grad(grad.const_data_ptr(), grad_bias.mutable_data_ptr(), n, k, plane, layout, dtype);
  }
};

}  // namespace
}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) { fastconv::Conv2dOps<fastconv::CpuConv2d>::add_to(m); }
