// Stacks of their own for CUDA threads that wait, and the switch between them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(FASTCONV_EMULATOR_UCONTEXT)
#define FASTCONV_EMULATOR_UCONTEXT
#endif

#if defined(FASTCONV_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace fastconv::emulator {

/// Where a fiber, or the scheduler on its own stack, goes on.
struct Context {
#if defined(FASTCONV_EMULATOR_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack_low = nullptr;  // for AddressSanitizer, which wants to know which stack is in use
  size_t stack_bytes = 0;
  void* sanitizer_state = nullptr;
};

/// Memory with an unmapped page below it, so that an overflow is a fault and not a wrong result.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* low() const { return low_; }
  static constexpr size_t kBytes = size_t{512} << 10;

 private:
  char* low_;
};

/// Makes `context` start `entry` on `stack`; entry must call arrived_on_fiber() first and never return. `stagger` moves
/// the first frame by a few cache lines: equal offsets in every stack would compete for the same cache sets.
void prepare(Context& context, const Stack& stack, void (*entry)(), unsigned stagger);

/// Leaves `from` and goes on in `to`.
void switch_context(Context& from, Context& to);

/// The first act of a fiber: tells AddressSanitizer where it came from.
void arrived_on_fiber(Context& from);

}  // namespace fastconv::emulator
