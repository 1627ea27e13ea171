#include "pool/average_plan.h"

namespace fastconv {
namespace {

/// Gives out consecutive pieces of one allocation.
class Pieces {
 public:
  explicit Pieces(std::vector<int64_t>& storage) : next_(storage.data()) {}
  int64_t* take(int64_t count) {
    int64_t* piece = next_;
    next_ += count;
    return piece;
  }

 private:
  int64_t* next_;
};

/// Fills an axis from window(i) = {begin, end, count}, whose begins and ends must not decrease.
template <class Window>
AverageAxis make_axis(Pieces& pieces, int64_t size, int64_t positions, const Window& window) {
  int64_t *begin = pieces.take(positions), *end = pieces.take(positions), *count = pieces.take(positions);
  int64_t *first = pieces.take(size), *last = pieces.take(size);
  for (int64_t i = 0; i < positions; ++i) window(i, begin[i], end[i], count[i]);
  // Windows are in order, so those that cover position j are consecutive.
  for (int64_t j = 0, f = 0, l = 0; j < size; ++j) {
    while (f < positions && end[f] <= j) ++f;
    while (l < positions && begin[l] <= j) ++l;
    first[j] = f, last[j] = max_of(f, l);
  }
  return {size, positions, begin, end, count, first, last};
}

AverageAxis regular_axis(Pieces& pieces, int64_t size, int64_t positions, int64_t window, int64_t stride,
                         int64_t padding, bool count_include_pad) {
  return make_axis(pieces, size, positions, [&](int64_t i, int64_t& begin, int64_t& end, int64_t& count) {
    const int64_t start = i * stride - padding, padded_end = min_of(start + window, size + padding);
    end = min_of(padded_end, size);
    begin = min_of(max_of(start, 0), end);
    // With ceil_mode a window may lie in the padding altogether; its sum is zero whatever divides it.
    count = max_of(1, count_include_pad ? padded_end - start : end - begin);
  });
}

AverageAxis adaptive_axis(Pieces& pieces, int64_t size, int64_t positions) {
  return make_axis(pieces, size, positions, [&](int64_t i, int64_t& begin, int64_t& end, int64_t& count) {
    begin = i * size / positions;
    end = ceil_div((i + 1) * size, positions);
    count = end - begin;
  });
}

}  // namespace

void plan_regular(AveragePlan& plan, const PoolProblem& grid, bool count_include_pad, double divisor_override) {
  plan.storage.resize(static_cast<std::size_t>(2 * (grid.h + grid.w) + 3 * (grid.p() + grid.q())));
  Pieces pieces(plan.storage);
  AverageProblem& p = plan.problem;
  p.n = grid.n, p.c = grid.c;
  p.rows = regular_axis(pieces, grid.h, grid.p(), grid.r, grid.stride.h, grid.padding.h, count_include_pad);
  p.columns = regular_axis(pieces, grid.w, grid.q(), grid.s, grid.stride.w, grid.padding.w, count_include_pad);
  p.divisor_override = divisor_override;
  p.regular = true, p.grid = grid;
  p.layout = grid.layout, p.dtype = grid.dtype;
}

void plan_adaptive(AveragePlan& plan, int64_t n, int64_t c, Size2 input, Size2 output, Layout layout, DType dtype) {
  plan.storage.resize(static_cast<std::size_t>(2 * (input.h + input.w) + 3 * (output.h + output.w)));
  Pieces pieces(plan.storage);
  AverageProblem& p = plan.problem;
  p.n = n, p.c = c;
  p.rows = adaptive_axis(pieces, input.h, output.h);
  p.columns = adaptive_axis(pieces, input.w, output.w);
  p.layout = layout, p.dtype = dtype;
}

}  // namespace fastconv
