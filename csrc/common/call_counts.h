// Call counters of one library's kernels.
#pragma once

#include <atomic>

#include "common/checks.h"

namespace fastconv {

template <class Id>
class CallCounts {
 public:
  void add(Id kernel) { calls_[static_cast<int32_t>(kernel)].fetch_add(1, std::memory_order_relaxed); }

  /// int64, on the CPU, in the registry's order.
  Tensor read() const {
    const int64_t sizes[1] = {kCount};
    Tensor counts = torch::stable::empty({sizes, 1}, torch::headeronly::ScalarType::Long);
    auto* values = static_cast<int64_t*>(counts.mutable_data_ptr());
    for (int32_t i = 0; i < kCount; ++i) values[i] = calls_[i].load(std::memory_order_relaxed);
    return counts;
  }

  void reset() {
    for (auto& count : calls_) count.store(0, std::memory_order_relaxed);
  }

 private:
  static constexpr int32_t kCount = static_cast<int32_t>(Id::count_);
  std::atomic<int64_t> calls_[kCount] = {};
};

}  // namespace fastconv
