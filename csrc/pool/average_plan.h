// Host side: where the windows of an averaging grid lie.
#pragma once

#include <vector>

#include "pool/pool.h"

namespace fastconv {

/// A problem's tables; `problem` points into `storage`.
struct AveragePlan {
  AverageProblem problem;
  std::vector<int64_t> storage;

  AveragePlan() = default;
  AveragePlan(const AveragePlan&) = delete;
  AveragePlan& operator=(const AveragePlan&) = delete;
};

/// The windows of avg_pool2d. The divisor counts a window's cells inside the padded input, or inside the input only.
void plan_regular(AveragePlan& plan, const PoolProblem& grid, bool count_include_pad, double divisor_override);

/// The windows of adaptive_avg_pool2d: output i of n covers [floor(i * size / n), ceil((i + 1) * size / n)).
void plan_adaptive(AveragePlan& plan, int64_t n, int64_t c, Size2 input, Size2 output, Layout layout, DType dtype);

}  // namespace fastconv
