// The pooling ops on the CPU, through the table of the active instruction set.
#include "common/kernel_table.h"
#include "common/registry.h"
#include "pool/average_plan.h"
#include "pool/host.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(pool_kernels)

struct CpuPool {
  static void max_pool(const PoolProblem& p, const Tensor& x, Tensor& y, Tensor* offsets) {
    count_call(offsets ? Kernel::max_pool2d_with_offsets : Kernel::max_pool2d);
    pool_kernels()->max_pool(p, x.const_data_ptr(), y.mutable_data_ptr(),
                             offsets ? offsets->mutable_data_ptr() : nullptr);
  }
  static void max_indices(const PoolProblem& p, const Tensor& offsets, Tensor& indices) {
    count_call(Kernel::max_pool2d_indices);
    pool_kernels()->max_indices(p, offsets.const_data_ptr(), static_cast<int64_t*>(indices.mutable_data_ptr()));
  }
  static void max_gather(const PoolProblem& p, const Tensor& x, const Tensor& offsets, Tensor& y) {
    count_call(Kernel::max_pool2d_gather);
    pool_kernels()->max_gather(p, x.const_data_ptr(), offsets.const_data_ptr(), y.mutable_data_ptr());
  }
  static void max_backward(const PoolProblem& p, const Tensor& grad, const Tensor& offsets, Tensor& grad_input) {
    count_call(Kernel::max_pool2d_backward);
    pool_kernels()->max_backward(p, grad.const_data_ptr(), offsets.const_data_ptr(), grad_input.mutable_data_ptr());
  }

  static void average(const PoolProblem& p, bool count_include_pad, double divisor_override, const Tensor& x,
                      Tensor& y) {
    AveragePlan plan;
    plan_regular(plan, p, count_include_pad, divisor_override);
    count_call(Kernel::avg_pool2d);
    pool_kernels()->average(plan.problem, x.const_data_ptr(), y.mutable_data_ptr());
  }
  static void average_backward(const PoolProblem& p, bool count_include_pad, double divisor_override,
                               const Tensor& grad, Tensor& grad_input) {
    AveragePlan plan;
    plan_regular(plan, p, count_include_pad, divisor_override);
    count_call(Kernel::avg_pool2d_backward);
    pool_kernels()->average_backward(plan.problem, grad.const_data_ptr(), grad_input.mutable_data_ptr());
  }

  static void adaptive(const PoolProblem& p, Size2 output, const Tensor& x, Tensor& y) {
    AveragePlan plan;
    plan_adaptive(plan, p.n, p.c, {p.h, p.w}, output, p.layout, p.dtype);
    count_call(Kernel::adaptive_avg_pool2d);
    pool_kernels()->average(plan.problem, x.const_data_ptr(), y.mutable_data_ptr());
  }
  static void adaptive_backward(const PoolProblem& p, Size2 output, const Tensor& grad, Tensor& grad_input) {
    AveragePlan plan;
    plan_adaptive(plan, p.n, p.c, {p.h, p.w}, output, p.layout, p.dtype);
    count_call(Kernel::adaptive_avg_pool2d_backward);
    pool_kernels()->average_backward(plan.problem, grad.const_data_ptr(), grad_input.mutable_data_ptr());
  }

  static void global_average(const PoolProblem& p, const Tensor& x, Tensor& y) {
    count_call(Kernel::global_avg_pool2d);
    pool_kernels()->global_average(p.n, p.c, p.h * p.w, p.layout, p.dtype, x.const_data_ptr(), y.mutable_data_ptr());
  }
  static void global_average_backward(const PoolProblem& p, const Tensor& grad, Tensor& grad_input) {
    count_call(Kernel::global_avg_pool2d_backward);
    pool_kernels()->global_average_backward(p.n, p.c, p.h * p.w, p.layout, p.dtype, grad.const_data_ptr(),
                                            grad_input.mutable_data_ptr());
  }
};

}  // namespace
}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) { fastconv::PoolOps<fastconv::CpuPool>::add_to(m); }
