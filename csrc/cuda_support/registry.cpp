#include "common/registry.h"

#include "common/call_counts.h"
#include "cuda_support/host.h"

namespace fastconv {
namespace {

CallCounts<CudaKernel> counts;

Tensor kernel_counts() { return counts.read(); }
void reset_kernel_counts() { counts.reset(); }
int64_t runtime_version() { return CUDART_VERSION; }

}  // namespace

void count_call(CudaKernel kernel) { counts.add(kernel); }

}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(FASTCONV_CUDA_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernel_counts", TORCH_BOX(&fastconv::kernel_counts));
  m.impl("reset_cuda_kernel_counts", TORCH_BOX(&fastconv::reset_kernel_counts));
  m.impl("cuda_runtime_version", TORCH_BOX(&fastconv::runtime_version));
}
