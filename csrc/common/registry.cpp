#include "common/registry.h"

#include <atomic>

#include "common/checks.h"

namespace fastconv {
namespace {

std::atomic<int64_t> calls[kKernelCount];

Tensor kernel_counts() {
  const int64_t sizes[1] = {kKernelCount};
  Tensor counts = torch::stable::empty({sizes, 1}, torch::headeronly::ScalarType::Long);
  auto* values = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int32_t i = 0; i < kKernelCount; ++i) values[i] = calls[i].load(std::memory_order_relaxed);
  return counts;
}

void reset_kernel_counts() {
  for (auto& count : calls) count.store(0, std::memory_order_relaxed);
}

}  // namespace

void count_call(Kernel kernel) { calls[static_cast<int32_t>(kernel)].fetch_add(1, std::memory_order_relaxed); }

}  // namespace fastconv

STABLE_TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {
  m.impl("kernel_counts", TORCH_BOX(&fastconv::kernel_counts));
  m.impl("reset_kernel_counts", TORCH_BOX(&fastconv::reset_kernel_counts));
}
