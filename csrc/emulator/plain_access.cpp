// Sees the kernels' plain loads and stores, for the race checks.
//
// The kernels are compiled for ThreadSanitizer, whose instrumentation calls a function before every access, and are not
// linked with its library but with this file. Only libraries of the kind "checked" contain it.
#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

/// Memory that only the running thread can mean: its own stack, and what the emulator keeps about it.
bool is_private(const char* pointer) {
  const char* stack = worker->running->stack.low();
  if (pointer >= stack && pointer < stack + Stack::kBytes) return true;
  const auto* thread = reinterpret_cast<const char*>(current);
  if (pointer >= thread && pointer < thread + sizeof(Identity)) return true;
  return pointer == reinterpret_cast<const char*>(&current);
}

void see(const void* pointer, size_t bytes, Access access, const void* instruction) {
  if (!current || !worker || !options().check_races) return;
  const auto* byte = static_cast<const char*>(pointer);
  if (is_private(byte)) return;
  Thread& thread = self();
  const Site site{access == Access::read ? "a load" : "a store", {}, instruction};
  for (auto& block : worker->batch.blocks) {
    const auto offset = reinterpret_cast<const unsigned char*>(byte) - block->shared;
    if (offset < 0 || offset >= block->shared_end) continue;
    check_shared(*block, kSharedWindow + static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes), access,
                 actor(thread), Proxy::generic, site);
    return;
  }
  check_global(pointer, bytes, access, actor(thread), site);
}

}  // namespace
}  // namespace fastconv::emulator

using fastconv::emulator::Access;
using fastconv::emulator::see;

extern "C" {
#define FASTCONV_ACCESS(name, bytes, access) \
  void name(void* pointer) { see(pointer, bytes, Access::access, __builtin_return_address(0)); }
#define FASTCONV_ACCESSES(bytes)                               \
  FASTCONV_ACCESS(__tsan_read##bytes, bytes, read)             \
  FASTCONV_ACCESS(__tsan_write##bytes, bytes, write)           \
  FASTCONV_ACCESS(__tsan_unaligned_read##bytes, bytes, read)   \
  FASTCONV_ACCESS(__tsan_unaligned_write##bytes, bytes, write) \
  FASTCONV_ACCESS(__tsan_volatile_read##bytes, bytes, read)    \
  FASTCONV_ACCESS(__tsan_volatile_write##bytes, bytes, write)
FASTCONV_ACCESSES(1)
FASTCONV_ACCESSES(2)
FASTCONV_ACCESSES(4)
FASTCONV_ACCESSES(8)
FASTCONV_ACCESSES(16)
void __tsan_read_range(void* pointer, size_t bytes) { see(pointer, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* pointer, size_t bytes) {
  see(pointer, bytes, Access::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
