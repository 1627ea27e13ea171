// Local response normalisation on the CPU, through the table of the active instruction set.
#include "common/kernel_table.h"
#include "common/registry.h"
#include "norm/host.h"

namespace fastconv {
namespace {

FASTCONV_KERNEL_TABLE(norm_kernels)

struct CpuNorm {
  static void forward(const NormProblem& p, const Tensor& x, Tensor& y) {
    count_call(Kernel::local_response_norm);
    norm_kernels()->forward(p, x.const_data_ptr(), y.mutable_data_ptr());
  }
  static void jvp(const NormProblem& p, const Tensor& x, const Tensor& tangent, Tensor& y_tangent) {
    count_call(Kernel::local_response_norm_jvp);
    norm_kernels()->jvp(p, x.const_data_ptr(), tangent.const_data_ptr(), y_tangent.mutable_data_ptr());
  }
  static void backward(const NormProblem& p, const Tensor& grad, const Tensor& x, Tensor& grad_input) {
    count_call(Kernel::local_response_norm_backward);
    norm_kernels()->backward(p, grad.const_data_ptr(), x.const_data_ptr(), grad_input.mutable_data_ptr());
  }
};

}  // namespace
}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) { fastconv::NormOps<fastconv::CpuNorm>::add_to(m); }
