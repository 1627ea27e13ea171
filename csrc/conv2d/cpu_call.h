// Forward convolutions on the CPU by raw pointers: what the operators call, and whoever runs many layers without
// tensors of them. No torch here.
//
//   const CpuChoice choice = choose_packed_conv2d(p);             once a layer and image size
//   if (packed_bytes(p, choice.kernel) > 0) pack_weight(...);     once a layer, if the weight is frozen
//   convolve(p, choice, x, weight, packed, epilogue, y);          every call
#pragma once

#include <optional>
#include <string_view>

#include "common/registry.h"
#include "conv2d/candidates.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {

/// The kernel of a call, and for one that works on a condition what takes the images that do not meet it.
struct CpuChoice {
  Kernel kernel;
  std::optional<Kernel> otherwise;
};

/// As the operators choose: by name, or the best if `algo` is empty. Throws std::runtime_error if there is none.
CpuChoice choose_conv2d(const ConvProblem& p, ConvPass pass, std::string_view algo);

/// The forward kernel of a call whose weight is frozen. What it reads may be kept: packed_bytes.
CpuChoice choose_packed_conv2d(const ConvProblem& p);

/// The problem with another image, of the smallest size that may use a packed weight: its form depends on none.
ConvProblem image_for_weight(ConvProblem p);

/// Bytes of the form in which a forward kernel reads the weight, with a header; 0 if it reads the weight as it is. Only
/// Winograd's depends on `form`.
int64_t packed_bytes(const ConvProblem& p, Kernel kernel, WinogradForm form);

/// Writes packed_bytes bytes: a header by which the form is known, then the weight. No alignment is asked for; 64 bytes
/// are best. `weight` is dense in p.layout.
void pack_weight(const ConvProblem& p, Kernel kernel, WinogradForm form, const void* weight, void* packed);

/// Throws std::runtime_error unless `bytes` bytes from `packed` on are pack_weight's of such a weight for this kernel.
void check_packed(const ConvProblem& p, Kernel kernel, const void* packed, int64_t bytes);

/// The kernel that `packed` is for, checked likewise, whether or not it is the best for this problem.
CpuChoice choose_by_packed(const ConvProblem& p, const void* packed, int64_t bytes);

/// y = activation(scale * (x * weight) + shift + residual), and counts the call. Tensors are dense in p.layout, scale
/// and shift in the type of the sums. `packed`, of choice.kernel and checked, or null; the weight is always needed:
/// images that do not meet Winograd's condition are computed from it. Nothing may be empty.
void convolve(const ConvProblem& p, const CpuChoice& choice, const void* x, const void* weight, const void* packed,
              const Epilogue& epilogue, void* y);

/// The weight in its kernel's form without the header, or null; the form of Winograd matters to no other kernel.
struct KeptWeight {
  WinogradForm form;
  const void* data;
};

/// Of an active instruction set that has them: select.h asks.
const PairKernels& pair_kernels();

/// One product by the kernel of its pass, uncounted.
void run_product(Kernel kernel, const GemmConv& product, Layout layout, DType dtype, const KeptWeight& kept);

/// One product; every kernel that computes an image of it is counted, once.
void run_choice(const CpuChoice& choice, const GemmConv& product, Layout layout, DType dtype, const KeptWeight& kept);

}  // namespace fastconv
