// Atomic operations on global and shared memory, and flags with acquire and release.
#include <atomic>
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

template <class T>
T combine(AtomicOperation operation, T old, T operand, T expected) {
  switch (operation) {
    case AtomicOperation::add:
      return old + operand;
    case AtomicOperation::minimum:
      return operand < old ? operand : old;
    case AtomicOperation::maximum:
      return operand > old ? operand : old;
    case AtomicOperation::exchange:
      return operand;
    case AtomicOperation::compare_exchange:
      return old == expected ? operand : old;
    case AtomicOperation::bit_and:
    case AtomicOperation::bit_or:
      if constexpr (std::is_integral_v<T>) return operation == AtomicOperation::bit_and ? old & operand : old | operand;
  }
  return old;
}

/// Other OS threads run other blocks, so the update must be atomic to the machine too.
template <class T>
uint64_t update(AtomicOperation operation, void* pointer, uint64_t operand_bits, uint64_t expected_bits) {
  T operand, expected;
  std::memcpy(&operand, &operand_bits, sizeof(T));
  std::memcpy(&expected, &expected_bits, sizeof(T));
  std::atomic_ref<T> target(*static_cast<T*>(pointer));
  T old = target.load();
  while (!target.compare_exchange_weak(old, combine(operation, old, operand, expected))) {
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &old, sizeof(T));
  return bits;
}

void check_access(const void* pointer, uint32_t bytes, const char* what, Location at) {
  if (!options().check_races) return;
  Block& block = *self().home;
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset >= 0 && offset < block.shared_end)
    check_shared(kSharedWindow + static_cast<uint32_t>(offset), bytes, Access::atomic, what, at);
  else check_global(pointer, bytes, Access::atomic, actor(self()), {what, at});
  synchronise_atomic(pointer);
}

}  // namespace

uint64_t atomic(AtomicType type, AtomicOperation operation, void* pointer, uint64_t operand, uint64_t expected,
                Location at) {
  const uint32_t bytes = type == AtomicType::u64 || type == AtomicType::f64 ? 8 : 4;
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(at, "an atomic of %u bytes at a misaligned address", bytes);
  check_access(pointer, bytes, "atomic", at);
  switch (type) {
    case AtomicType::i32:
      return update<int32_t>(operation, pointer, operand, expected);
    case AtomicType::u32:
      return update<uint32_t>(operation, pointer, operand, expected);
    case AtomicType::u64:
      return update<uint64_t>(operation, pointer, operand, expected);
    case AtomicType::f32:
      return update<float>(operation, pointer, operand, expected);
    case AtomicType::f64:
      return update<double>(operation, pointer, operand, expected);
  }
  fail(at, "an atomic of unknown type");
}

uint32_t load_acquire(const uint32_t* flag, Location at) {
  yield(at);  // a loop over it waits for another block
  check_access(flag, 4, "ld.acquire", at);
  const uint32_t value = std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(flag)).load();
  thread_fence();
  return value;
}

void store_release(uint32_t* flag, uint32_t value, Location at) {
  thread_fence();
  check_access(flag, 4, "st.release", at);
  std::atomic_ref<uint32_t>(*flag).store(value);
}

}  // namespace fastconv::emulator
