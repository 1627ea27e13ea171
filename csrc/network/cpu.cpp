// Carries out the program of a fused network on the CPU.
#include <vector>

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "conv2d/cpu_call.h"
#include "conv2d/host.h"
#include "network/network.h"
#include "network/relayout.h"
#include "pool/average_plan.h"
#include "pool/host.h"

namespace fastconv {
namespace {

constexpr const char* kOp = "network";

FASTCONV_KERNEL_TABLE(pool_kernels)

/// The memory of a call. Every access is checked for lying inside it: a program is data.
class Places {
 public:
  Places(const std::vector<Tensor>& tensors, const std::vector<Tensor>& constants, const Tensor& workspace)
      : tensors_(tensors), constants_(constants), workspace_(workspace) {
    require(tensors.size() > 0, kOp, ": there are no inputs");
    dtype_ = dtype_of(kOp, tensors[0]);
    for (const Tensor& tensor : tensors) {
      require(tensor.is_cpu(), kOp, ": inputs and outputs are expected on the CPU");
      require_same_dtype(kOp, tensors[0], "another input or output", tensor);
    }
    require(workspace.is_cpu() && workspace.is_contiguous() && workspace.element_size() == 1, kOp,
            ": workspace is expected to be bytes on the CPU");
  }

  DType dtype() const { return dtype_; }

  /// `elems` elements at a place.
  void* at(Place place, int64_t elems) const {
    const int64_t end = place.offset + elems * element_bytes(dtype_);
    require(elems > 0 && place.offset >= 0 && place.base != kNothing, kOp, ": a step has no memory");
    if (place.base < 0) {
      const Tensor& tensor = element(tensors_, -1 - place.base);
      require(end <= tensor.numel() * element_bytes(dtype_), kOp, ": a step reaches beyond an input or output of ",
              tensor.numel(), " elements");
      return static_cast<char*>(tensor.mutable_data_ptr()) + place.offset;
    }
    require(place.base + end <= workspace_.numel(), kOp, ": a step reaches beyond the workspace");
    return static_cast<char*>(workspace_.mutable_data_ptr()) + place.base + place.offset;
  }

  /// A constant of `elems` elements of `dtype`; null if there is none.
  const void* constant(int64_t index, int64_t elems, DType dtype) const {
    if (index == kNothing) return nullptr;
    const Tensor& tensor = element(constants_, index);
    require(tensor.is_cpu() && tensor.numel() == elems && dtype_of(kOp, tensor) == dtype, kOp, ": constant ", index,
            " has ", tensor.numel(), " elements, expected ", elems, " of the step's dtype");
    return tensor.const_data_ptr();
  }
  /// A constant that conv2d_pack made.
  const Tensor& packed(int64_t index) const {
    const Tensor& tensor = element(constants_, index);
    require(tensor.is_cpu() && tensor.is_contiguous(), kOp, ": a packed weight is expected to be dense on the CPU");
    return tensor;
  }

 private:
  static const Tensor& element(const std::vector<Tensor>& list, int64_t index) {
    require(index >= 0 && index < std::ssize(list), kOp, ": a step names tensor ", index, " of ", list.size());
    return list[static_cast<std::size_t>(index)];
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<Tensor>& constants_;
  const Tensor& workspace_;
  DType dtype_;
};

DType sums_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void convolve(const Step& step, const Places& places) {
  const int64_t* a = step.numbers;
  ConvProblem p = conv_problem(kOp, {a[7], a[8]}, {a[9], a[10], a[11], a[12]}, {a[13], a[14]}, a[15]);
  p.layout = Layout::nhwc, p.dtype = places.dtype(), p.weight_is_nchw = a[17] != 0;
  set_weight(kOp, p, a[4], a[5], a[6]);
  set_input(kOp, p, a[0], a[1], a[2], a[3]);
  const int64_t outputs = p.n * p.k * p.p() * p.q();
  Epilogue epilogue{};
  epilogue.shift = places.constant(step.shift, p.k, sums_dtype(p.dtype));
  epilogue.residual = step.residual.base == kNothing ? nullptr : places.at(step.residual, outputs);
  epilogue.activation = static_cast<Activation>(a[16]);
  const Tensor* packed = step.packed == kNothing ? nullptr : &places.packed(step.packed);
  // The packed form decides, whatever would be chosen for so many images.
  const CpuChoice choice = packed
                               ? choose_by_packed(p, packed->const_data_ptr(), packed->numel() * packed->element_size())
                               : choose_conv2d(p, ConvPass::forward, "");
  convolve(p, choice, places.at(step.input, p.n * p.c * p.h * p.w),
           places.constant(step.weight, p.k * p.c_per_group() * p.r * p.s, p.dtype),
           packed ? packed->const_data_ptr() : nullptr, epilogue, places.at(step.output, outputs));
}

PoolProblem pool_of(const Step& step, DType dtype) {
  const int64_t* a = step.numbers;
  PoolProblem p = pool_problem(kOp, {a[4], a[5]}, {a[6], a[7]}, {a[8], a[9]}, {a[10], a[11]}, a[12] != 0);
  p.layout = Layout::nhwc, p.dtype = dtype;
  set_input(kOp, p, a[0], a[1], a[2], a[3]);
  return p;
}

void max_pool(const Step& step, const Places& places) {
  const PoolProblem p = pool_of(step, places.dtype());
  count_call(Kernel::max_pool2d);
  pool_kernels()->max_pool(p, places.at(step.input, p.n * p.c * p.h * p.w),
                           places.at(step.output, p.n * p.c * p.p() * p.q()), nullptr);
}

void average_pool(const Step& step, const Places& places) {
  const PoolProblem p = pool_of(step, places.dtype());
  AveragePlan plan;
  plan_regular(plan, p, step.numbers[13] != 0, static_cast<double>(step.numbers[14]));
  count_call(Kernel::avg_pool2d);
  pool_kernels()->average(plan.problem, places.at(step.input, p.n * p.c * p.h * p.w),
                          places.at(step.output, p.n * p.c * p.p() * p.q()));
}

void adaptive_average_pool(const Step& step, const Places& places) {
  const int64_t n = step.numbers[0], c = step.numbers[1], h = step.numbers[2], w = step.numbers[3];
  const Size2 output{step.numbers[4], step.numbers[5]};
  const void* x = places.at(step.input, n * c * h * w);
  void* y = places.at(step.output, n * c * output.h * output.w);
  if (output.h == 1 && output.w == 1) {
    count_call(Kernel::global_avg_pool2d);
    pool_kernels()->global_average(n, c, h * w, Layout::nhwc, places.dtype(), x, y);
    return;
  }
  AveragePlan plan;
  plan_adaptive(plan, n, c, {h, w}, output, Layout::nhwc, places.dtype());
  count_call(Kernel::adaptive_avg_pool2d);
  pool_kernels()->average(plan.problem, x, y);
}

/// Between (n, c, h, w) and (n, h, w, c): `rows` of `columns` elements are transposed for each image.
void transpose_step(const Step& step, const Places& places, bool to_nhwc) {
  const int64_t n = step.numbers[0], c = step.numbers[1], plane = step.numbers[2] * step.numbers[3];
  const void* x = places.at(step.input, n * c * plane);
  void* y = places.at(step.output, n * c * plane);
  dispatch(places.dtype(), [&](auto type) {
    using T = decltype(type);
    transpose_images(static_cast<const T*>(x), static_cast<T*>(y), n, to_nhwc ? c : plane, to_nhwc ? plane : c);
  });
}

void run_step(const Step& step, const Places& places) {
  switch (step.kind) {
    case StepKind::convolve:
      return convolve(step, places);
    case StepKind::max_pool:
      return max_pool(step, places);
    case StepKind::average_pool:
      return average_pool(step, places);
    case StepKind::adaptive_average_pool:
      return adaptive_average_pool(step, places);
    case StepKind::to_nhwc:
      return transpose_step(step, places, true);
    case StepKind::to_nchw:
      return transpose_step(step, places, false);
  }
  require(false, kOp, ": unknown step ", static_cast<int64_t>(step.kind));
}

/// tensors: the inputs, then the outputs, dense in the layouts that the program takes them for.
void network(const Tensor& program, std::vector<Tensor> tensors, std::vector<Tensor> constants,
             const Tensor& workspace) {
  require(program.is_cpu() && program.is_contiguous() && program.scalar_type() == torch::headeronly::ScalarType::Long &&
              program.numel() > 0,
          kOp, ": program is expected to be int64 on the CPU");
  const auto* numbers = static_cast<const int64_t*>(program.const_data_ptr());
  constexpr int64_t kSize = sizeof(Step) / sizeof(int64_t);
  require(numbers[0] == kProgramMark && program.numel() % kSize == 1, kOp, ": program is none of this version");
  const Places places(tensors, constants, workspace);
  const auto* steps = reinterpret_cast<const Step*>(numbers + 1);
  for (int64_t i = 0; i < program.numel() / kSize; ++i) run_step(steps[i], places);
}

}  // namespace
}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) { m.impl("network", TORCH_BOX(&fastconv::network)); }
