// torch's thread pool, without torch's headers, for translation units that are compiled for one instruction set.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fastconv {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
int64_t thread_count();

/// body(begin, end) over chunks of at least `grain`, on torch's intra-op threads. Rethrows the first exception.
template <class Body>
FASTCONV_INLINE void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  parallel_ranges(
      begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

/// Scratch memory, 64-byte aligned, freed at the end of the scope. Throws std::runtime_error.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  FASTCONV_INLINE T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace fastconv
