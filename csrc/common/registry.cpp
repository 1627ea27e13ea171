#include "common/registry.h"

#include "common/call_counts.h"

namespace fastconv {
namespace {

CallCounts<Kernel> counts;

Tensor kernel_counts() { return counts.read(); }
void reset_kernel_counts() { counts.reset(); }

}  // namespace

void count_call(Kernel kernel) { counts.add(kernel); }

}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {
  m.impl("kernel_counts", TORCH_BOX(&fastconv::kernel_counts));
  m.impl("reset_kernel_counts", TORCH_BOX(&fastconv::reset_kernel_counts));
}
