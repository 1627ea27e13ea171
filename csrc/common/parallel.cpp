#include "common/parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

namespace fastconv {

namespace {

/// The first exception of a loop, carried past torch's C interface, which would drop it.
struct Loop {
  RangeBody body;
  void* context;
  std::atomic_flag failed;
  std::exception_ptr failure;

  void run(int64_t begin, int64_t end) noexcept {
    try {
      body(begin, end, context);
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
  }
};

}  // namespace

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end, context);
  Loop loop{body, context, {}, nullptr};
  const auto run = [](int64_t b, int64_t e, void* state) { static_cast<Loop*>(state)->run(b, e); };
  if (torch_parallel_for(begin, end, grain, run, &loop) != 0)
    throw std::runtime_error("fastconv: a parallel loop failed in torch's thread pool");
  if (loop.failure) std::rethrow_exception(loop.failure);
}

int64_t thread_count() {
  uint32_t count = 1;
  if (torch_get_num_threads(&count) != 0) throw std::runtime_error("fastconv: torch has no thread pool");
  return count;
}

Scratch::Scratch(int64_t bytes) : data_(nullptr) {
  if (bytes <= 0) return;
  data_ = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (data_ == nullptr)
    throw std::runtime_error("fastconv: out of memory: " + std::to_string(bytes) + " bytes of scratch");
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace fastconv
