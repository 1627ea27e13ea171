// The context switch: twelve instructions on x86-64, ucontext elsewhere (or with FASTCONV_EMULATOR_UCONTEXT, which the
// tests use so that this branch is compiled and run on every machine).
#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastconv::emulator {
namespace {
constexpr size_t kGuardBytes = 4096;
}

Stack::Stack() {
  void* memory =
      mmap(nullptr, kGuardBytes + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  low_ = static_cast<char*>(memory) + kGuardBytes;
}

Stack::~Stack() { munmap(low_ - kGuardBytes, kGuardBytes + kBytes); }

#if defined(FASTCONV_EMULATOR_UCONTEXT)

static void start(Context& context, const Stack& stack, void (*entry)(), size_t skipped_bytes) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.low();
  context.registers.uc_stack.ss_size = Stack::kBytes - skipped_bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}
static void leave(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#else

// Saves the callee-saved registers on the old stack and takes them from the new one; all else is the compiler's.
extern "C" void fastconv_emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden fastconv_emulator_switch
.globl fastconv_emulator_switch
.type fastconv_emulator_switch,@function
fastconv_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastconv_emulator_switch, .-fastconv_emulator_switch
)");

static void start(Context& context, const Stack& stack, void (*entry)(), size_t skipped_bytes) {
  auto** top = reinterpret_cast<void**>(stack.low() + Stack::kBytes - skipped_bytes);
  *--top = nullptr;                         // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);  // where `ret` goes
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}
static void leave(Context& from, Context& to) { fastconv_emulator_switch(&from.stack_pointer, to.stack_pointer); }

#endif

void prepare(Context& context, const Stack& stack, void (*entry)(), unsigned stagger) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.low(), Stack::kBytes);  // a fiber may have been given up in mid-function
#endif
  context.stack_low = stack.low();
  context.stack_bytes = Stack::kBytes;
  context.sanitizer_state = nullptr;
  start(context, stack, entry, 64 + stagger % 61 * 64);
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer_state, to.stack_low, to.stack_bytes);
  leave(from, to);
  __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#else
  leave(from, to);
#endif
}

void arrived_on_fiber([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack_low, &from.stack_bytes);
#endif
}

}  // namespace fastconv::emulator
