#include "conv2d/cpu_call.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/kernel_table.h"
#include "conv2d/cpu_winograd_condition.h"
#include "conv2d/gemm_plan.h"
#include "conv2d/select.h"
#include "depthwise/depthwise.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(conv2d_kernels)
FASTCONV_KERNEL_TABLE(depthwise_kernels)

/// What a packed weight begins with; all that its form depends on.
struct PackedHeader {
  int64_t form, k, c_per_group, r, s, groups, bytes, tile;

  PackedHeader() = default;
  PackedHeader(const ConvProblem& p, Kernel kernel, WinogradForm winograd, int64_t all_bytes)
      : form(int64_t{0x46434b57} << 32 | static_cast<int64_t>(active_isa()) << 24 | static_cast<int64_t>(kernel) << 16 |
             static_cast<int64_t>(kernel == Kernel::conv2d_winograd ? Layout::nhwc : p.layout) << 8 |
             static_cast<int64_t>(p.dtype)),
        k(p.k),
        c_per_group(p.c_per_group()),
        r(p.r),
        s(p.s),
        groups(p.groups),
        bytes(all_bytes),
        tile(kernel == Kernel::conv2d_winograd ? winograd_outputs(winograd) : 0) {}
};

constexpr int64_t kHeaderBytes = sizeof(PackedHeader);
static_assert(kHeaderBytes == 64, "so that what follows is aligned as the whole is");

CpuChoice with_condition(Kernel kernel, const ConvProblem& p, ConvPass pass) {
  if (kernel != Kernel::conv2d_winograd && kernel != Kernel::conv2d_input_grad_winograd) return {kernel, std::nullopt};
  return {kernel, select_conv2d(p, pass, "direct")};
}

/// Zeros if there are too few bytes for one.
PackedHeader header_of(const void* packed, int64_t bytes) {
  PackedHeader header{};
  if (bytes >= kHeaderBytes) std::memcpy(&header, packed, sizeof(header));
  return header;
}

}  // namespace

CpuChoice choose_conv2d(const ConvProblem& p, ConvPass pass, std::string_view algo) {
  const Kernel kernel = select_conv2d(p, pass, algo);
  return algo.empty() ? with_condition(kernel, p, pass) : CpuChoice{kernel, std::nullopt};
}

CpuChoice choose_packed_conv2d(const ConvProblem& p) {
  return with_condition(select_packed_conv2d(p), p, ConvPass::forward);
}

ConvProblem image_for_weight(ConvProblem p) {
  p.n = 1;
  p.h = max_of(4, p.dilation.h * (p.r - 1) + 1), p.w = max_of(4, p.dilation.w * (p.s - 1) + 1);
  return p;
}

int64_t packed_bytes(const ConvProblem& problem, Kernel kernel, WinogradForm form) {
  if (refuse_keeping(problem, kernel) != nullptr) return 0;
  const ConvProblem p = image_for_weight(problem);
  std::vector<Tap> taps;
  const GemmConv product = forward_product(p, nullptr, nullptr, nullptr, taps);
  const Conv2dKernels& kernels = *conv2d_kernels();
  if (kernel == Kernel::conv2d_winograd)
    return kHeaderBytes + kernels.winograd_filter_elems(product, form) * static_cast<int64_t>(sizeof(float));
  return kHeaderBytes + kernels.tiled_panel_elems(product, p.dtype) * (p.dtype == DType::f64 ? 8 : 4);
}

void pack_weight(const ConvProblem& problem, Kernel kernel, WinogradForm form, const void* weight, void* packed) {
  const ConvProblem p = image_for_weight(problem);
  const PackedHeader header(p, kernel, form, packed_bytes(p, kernel, form));
  std::memcpy(packed, &header, sizeof(header));
  void* data = static_cast<char*>(packed) + kHeaderBytes;
  std::vector<Tap> taps;
  const GemmConv product = forward_product(p, nullptr, weight, nullptr, taps);
  if (kernel == Kernel::conv2d_winograd)
    conv2d_kernels()->winograd_filters(product, p.dtype, form, static_cast<float*>(data));
  else conv2d_kernels()->tiled_panels(product, p.dtype, data);
}

void check_packed(const ConvProblem& p, Kernel kernel, const void* packed, int64_t bytes) {
  const std::string name = kKernelNames[static_cast<int>(kernel)].algo;
  if (packed_bytes(p, kernel, WinogradForm::f4) == 0)
    throw std::runtime_error("conv2d_fused: packed is given, but " + name +
                             ", the kernel of this problem, reads the weight as it is; leave packed out");
  const PackedHeader found = header_of(packed, bytes);
  const WinogradForm form = found.tile == 2 ? WinogradForm::f2 : WinogradForm::f4;
  const PackedHeader wanted(p, kernel, form, packed_bytes(p, kernel, form));
  if (bytes != wanted.bytes || std::memcmp(&found, &wanted, sizeof(wanted)) != 0)
    throw std::runtime_error("conv2d_fused: packed, of " + std::to_string(bytes) +
                             " bytes, is not of such a weight in the form of " + name +
                             "; pack this weight for this memory format and kernel (conv2d_pack)");
}

CpuChoice choose_by_packed(const ConvProblem& p, const void* packed, int64_t bytes) {
  const PackedHeader found = header_of(packed, bytes);
  const Kernel kernel = found.tile == 0 ? Kernel::conv2d_tiled : Kernel::conv2d_winograd;
  check_packed(p, kernel, packed, bytes);
  return with_condition(kernel, p, ConvPass::forward);
}

const PairKernels& pair_kernels() {
#if defined(__x86_64__)
  return *conv2d_pairs_avx512_bf16();
#else
  throw std::logic_error("no kernels for pairs of bfloat16 were built");
#endif
}

void run_product(Kernel kernel, const GemmConv& product, Layout layout, DType dtype, const KeptWeight& kept) {
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
      return WinogradProduct(kernels, product, layout, dtype, kept.form, static_cast<const float*>(kept.data))
          .run(product);
    default:
      return kernels.tiled(&product, 1, layout, dtype, kept.data);
  }
}

void run_choice(const CpuChoice& choice, const GemmConv& product, Layout layout, DType dtype, const KeptWeight& kept) {
  if (!choice.otherwise) {
    count_call(choice.kernel);
    return run_product(choice.kernel, product, layout, dtype, kept);
  }
  const std::vector<double> energies = winograd_energies(*conv2d_kernels(), product, layout, dtype, kept.form);
  const auto at = [&](int64_t image) { return energies[static_cast<std::size_t>(image)]; };
  std::optional<WinogradProduct> winograd;
  const bool any = std::any_of(energies.begin(), energies.end(), [](double energy) { return energy >= 0; });
  if (any) winograd.emplace(*conv2d_kernels(), product, layout, dtype, kept.form, static_cast<const float*>(kept.data));
  const auto fits = [&](int64_t image) {
    return winograd && at(image) >= 0 && winograd->stays_finite(product, at(image));
  };
  bool counted[2] = {};
  for_image_runs(product, dtype, fits, [&](const GemmConv& images, bool fit) {
    const Kernel kernel = fit ? choice.kernel : *choice.otherwise;
    if (!counted[fit]) count_call(kernel);
    counted[fit] = true;
    if (fit) winograd->run(images);
    else run_product(kernel, images, layout, dtype, {kept.form, nullptr});
  });
}

void convolve(const ConvProblem& p, const CpuChoice& choice, const void* x, const void* weight, const void* packed,
              const Epilogue& epilogue, void* y) {
  if (choice.kernel == Kernel::depthwise) {
    count_call(choice.kernel);
    return depthwise_kernels()->forward(p, x, weight, y, epilogue);
  }
  std::vector<Tap> taps;
  GemmConv product = forward_product(p, x, weight, y, taps);
  product.epilogue = epilogue;
  KeptWeight kept{WinogradCost(p, ConvPass::forward, false).form(), nullptr};
  if (packed != nullptr) {
    kept.data = static_cast<const char*>(packed) + kHeaderBytes;
    if (header_of(packed, kHeaderBytes).tile == 2) kept.form = WinogradForm::f2;
    else kept.form = WinogradForm::f4;
  }
  run_choice(choice, product, p.layout, p.dtype, kept);
}

}  // namespace fastconv
