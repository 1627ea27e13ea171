#include "common/parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <new>
#include <stdexcept>

namespace fastconv {

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  if (begin >= end) return;
  if (torch_parallel_for(begin, end, grain, body, context) != 0)
    throw std::runtime_error("fastconv: a parallel loop failed in torch's thread pool");
}

int64_t thread_count() {
  uint32_t count = 1;
  if (torch_get_num_threads(&count) != 0) throw std::runtime_error("fastconv: torch has no thread pool");
  return count;
}

Scratch::Scratch(int64_t bytes) : data_(nullptr) {
  if (bytes <= 0) return;
  data_ = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace fastconv
