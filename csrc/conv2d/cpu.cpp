// The convolution ops on the CPU: kernels chosen by select.h, through the table of the active instruction set.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/kernel_table.h"
#include "common/parallel.h"
#include "conv2d/cpu_winograd_condition.h"
#include "conv2d/gemm_plan.h"
#include "conv2d/host.h"
#include "conv2d/select.h"
#include "depthwise/depthwise.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(conv2d_kernels)
FASTCONV_KERNEL_TABLE(depthwise_kernels)

/// Of an active instruction set that has them: select.h asks.
const PairKernels& pair_kernels() {
#if defined(__x86_64__)
  return *conv2d_pairs_avx512_bf16();
#else
  throw std::logic_error("no kernels for pairs of bfloat16 were built");
#endif
}

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

/// The kernel of a call, and for one that works on a condition what takes the images that do not meet it.
struct CpuChoice {
  Kernel kernel;
  std::optional<Kernel> otherwise;
};

/// One product by the kernel of its pass.
void run_product(Kernel kernel, const GemmConv& product, Layout layout, DType dtype, const float* packed = nullptr) {
  const Conv2dKernels& kernels = *conv2d_kernels();
  switch (kernel) {
    case Kernel::conv2d_naive:
    case Kernel::conv2d_input_grad_naive:
      return kernels.naive(product, dtype);
    case Kernel::conv2d_rows:
    case Kernel::conv2d_input_grad_rows:
      return kernels.rows(product, dtype);
    case Kernel::conv2d_pairs:
    case Kernel::conv2d_input_grad_pairs:
      return pair_kernels().convolve(&product, 1, layout);
    case Kernel::conv2d_winograd:
    case Kernel::conv2d_input_grad_winograd:
      return WinogradProduct(kernels, product, layout, dtype, packed).run(product);
    default:
      return kernels.tiled(&product, 1, layout, dtype);
  }
}

/// One product; every kernel that computes an image of it is counted, once.
void run_choice(const CpuChoice& choice, const GemmConv& product, Layout layout, DType dtype,
                const float* packed = nullptr) {
  if (!choice.otherwise) {
    count_call(choice.kernel);
    return run_product(choice.kernel, product, layout, dtype, packed);
  }
  const std::vector<double> energies = winograd_energies(*conv2d_kernels(), product, layout, dtype);
  const auto at = [&](int64_t image) { return energies[static_cast<std::size_t>(image)]; };
  std::optional<WinogradProduct> winograd;
  const bool any = std::any_of(energies.begin(), energies.end(), [](double energy) { return energy >= 0; });
  if (any) winograd.emplace(*conv2d_kernels(), product, layout, dtype, packed);
  const auto fits = [&](int64_t image) {
    return winograd && at(image) >= 0 && winograd->stays_finite(product, at(image));
  };
  bool counted[2] = {};
  for_image_runs(product, dtype, fits, [&](const GemmConv& images, bool fit) {
    const Kernel kernel = fit ? choice.kernel : *choice.otherwise;
    if (!counted[fit]) count_call(kernel);
    counted[fit] = true;
    if (fit) winograd->run(images);
    else run_product(kernel, images, layout, dtype);
  });
}

/// Elements of conv2d_pack's result. One more in NHWC, so that neither layout's filters are taken for the other's.
int64_t packed_elems(const GemmConv& product, Layout layout) {
  return conv2d_kernels()->winograd_filter_elems(product, layout) + (layout == Layout::nhwc ? 1 : 0);
}

/// The filters in `packed` if they can serve the problem, else null; raises if they are of another one.
const float* packed_filters(const Tensor* packed, const ConvProblem& p, const GemmConv& product) {
  if (packed == nullptr || refuse_packed(p) != nullptr) return nullptr;
  require(packed->is_cpu() && packed->is_contiguous() && packed->scalar_type() == torch::headeronly::ScalarType::Float,
          "conv2d_fused: packed is expected to be what conv2d_pack gave");
  const int64_t wanted = packed_elems(product, p.layout);
  require(packed->numel() == wanted, "conv2d_fused: packed has ", packed->numel(), " elements, expected ", wanted,
          "; pack this weight for this memory format (conv2d_pack)");
  return static_cast<const float*>(packed->const_data_ptr());
}

struct CpuConv2d {
  static constexpr bool kPacks = true;

  static CpuChoice with_condition(Kernel kernel, const ConvProblem& p, ConvPass pass) {
    if (winograd_condition(kernel) == nullptr) return {kernel, std::nullopt};
    return {kernel, select_conv2d(p, pass, "direct")};
  }

  static CpuChoice select(const ConvProblem& p, ConvPass pass, std::string_view algo) {
    const Kernel kernel = select_conv2d(p, pass, algo);
    return algo.empty() ? with_condition(kernel, p, pass) : CpuChoice{kernel, std::nullopt};
  }

  static CpuChoice select_packed(const ConvProblem& p) {
    return with_condition(select_packed_conv2d(p), p, ConvPass::forward);
  }

  /// Transformed filters, which any image of at least 4x4 pixels may use.
  static Tensor pack(ConvProblem p, const Tensor& weight) {
    p.n = 1, p.h = p.w = 4;
    const char* reason = refuse_packed(p);
    require(reason == nullptr, "conv2d_pack: only Winograd keeps filters, and ", reason ? reason : "");
    std::vector<Tap> taps;
    const GemmConv product = forward_product(p, nullptr, weight.const_data_ptr(), nullptr, taps);
    const int64_t elems = packed_elems(product, p.layout);
    Tensor packed = torch::stable::empty({&elems, 1}, torch::headeronly::ScalarType::Float);
    auto* filters = static_cast<float*>(packed.mutable_data_ptr());
    filters[elems - 1] = 0;
    conv2d_kernels()->winograd_filters(product, p.layout, p.dtype, filters);
    return packed;
  }

  static void forward(const CpuChoice& choice, const ConvProblem& p, const Tensor& x, const Tensor& weight,
                      const FusedOperands& fused, Tensor& y) {
    const ChannelValues scales("conv2d", fused.scale, p), shifts("conv2d", fused.shift, p);
    const Epilogue epilogue{scales.data(), shifts.data(), fused.residual ? fused.residual->const_data_ptr() : nullptr,
                            fused.activation};
    if (choice.kernel == Kernel::depthwise) {
      count_call(choice.kernel);
      depthwise_kernels()->forward(p, x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(), epilogue);
      return;
    }
    std::vector<Tap> taps;
    GemmConv product = forward_product(p, x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(), taps);
    product.epilogue = epilogue;
    run_choice(choice, product, p.layout, p.dtype, packed_filters(fused.packed, p, product));
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
    if (phases.size() == 1) return run_choice(choice, phases[0], p.layout, p.dtype);
    count_call(choice.kernel);
    if (choice.kernel == Kernel::conv2d_input_grad_tiled) {
      conv2d_kernels()->tiled(phases.data(), static_cast<int64_t>(phases.size()), p.layout, p.dtype);
      return;
    }
    if (choice.kernel == Kernel::conv2d_input_grad_pairs) {
      pair_kernels().convolve(phases.data(), static_cast<int64_t>(phases.size()), p.layout);
      return;
    }
    for (const GemmConv& phase : phases) run_product(choice.kernel, phase, p.layout, p.dtype);
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
