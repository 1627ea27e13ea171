// What CUDA gives every kernel without an include: who am I, barriers, shuffles, votes, atomics, intrinsics.
//
// A call that may wait takes the caller's source location as a default argument, so that a deadlock or race report
// names lines of the kernel without the kernel's help.
#pragma once

#include <algorithm>
#include <bit>
#include <source_location>
#include <type_traits>

#include "emulator/language.h"

namespace fastconv::emulator {

using Location = std::source_location;

struct Identity {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern constinit thread_local Identity* current;  // of the thread that runs on this OS thread

/// Aborts the launch: run() throws a std::runtime_error with this text and where it happened.
[[noreturn]] void fail(Location at, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---------------------------------------------------------------- waiting

void sync_threads(Location at);
int sync_threads_reduce(int value, int (*combine)(int, int), Location at);
void sync_warp(unsigned mask, Location at);
/// Lets others run; a loop that polls memory calls it each time round.
void yield(Location at);
void thread_fence();

/// What the lanes of a warp do together. Each brings a pointer to its operands; the last one to come calls `combine`
/// with all of them (null for lanes outside the mask or gone), then all go on.
using Combine = void (*)(void* const (&operands)[32], Location at);
void warp_collective(const char* name, unsigned mask, void* operands, Combine combine, Location at);
unsigned active_mask();
int lane_index();

// ---------------------------------------------------------------- memory

unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment, Location at);

/// `Key` is the type of a lambda written at the declaration, so one array per declaration and template instance.
template <class Array, class Key>
Array& static_shared(Key, Location at = Location::current()) {
  static const char key = 0;
  return *static_cast<Array*>(static_shared(&key, sizeof(Array), alignof(Array) > 16 ? alignof(Array) : 16, at));
}

inline void expect_aligned(const void* pointer, size_t bytes, Location at = Location::current()) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    fail(at, "a vector of %zu bytes at address %p, expected a multiple of its size", bytes, pointer);
}

enum class AtomicType { i32, u32, u64, f32, f64 };
enum class AtomicOperation { add, minimum, maximum, exchange, compare_exchange, bit_and, bit_or };
uint64_t atomic(AtomicType type, AtomicOperation operation, void* pointer, uint64_t operand, uint64_t expected,
                Location at);

template <class T>
T atomic(AtomicOperation operation, T* pointer, T operand, T expected, Location at) {
  constexpr AtomicType type = std::is_same_v<T, float>    ? AtomicType::f32
                              : std::is_same_v<T, double> ? AtomicType::f64
                              : sizeof(T) == 8            ? AtomicType::u64
                              : std::is_signed_v<T>       ? AtomicType::i32
                                                          : AtomicType::u32;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the emulator has 32-bit and 64-bit atomics");
  uint64_t bits = 0, wanted = 0;
  std::memcpy(&bits, &operand, sizeof(T));
  std::memcpy(&wanted, &expected, sizeof(T));
  const uint64_t old_bits = atomic(type, operation, pointer, bits, wanted, at);
  T old;
  std::memcpy(&old, &old_bits, sizeof(T));
  return old;
}

// ---------------------------------------------------------------- warp collectives

struct Shuffle {
  uint64_t value, result;
  int source;
};
void combine_shuffle(void* const (&operands)[32], Location at);

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Location at) {
  static_assert(sizeof(T) <= 8, "CUDA shuffles at most 8 bytes");
  Shuffle mine{0, 0, source};
  std::memcpy(&mine.value, &value, sizeof(T));
  warp_collective(name, mask, &mine, combine_shuffle, at);
  std::memcpy(&value, &mine.result, sizeof(T));
  return value;
}

struct Vote {
  bool predicate;
  unsigned ballot;
};
void combine_vote(void* const (&operands)[32], Location at);

inline unsigned vote(const char* name, unsigned mask, bool predicate, Location at) {
  Vote mine{predicate, 0};
  warp_collective(name, mask, &mine, combine_vote, at);
  return mine.ballot;
}

}  // namespace fastconv::emulator

#define FASTCONV_HERE ::fastconv::emulator::Location at = ::fastconv::emulator::Location::current()

// ---------------------------------------------------------------- identity and barriers

#define threadIdx (::fastconv::emulator::current->thread)
#define blockIdx (::fastconv::emulator::current->block)
#define blockDim (::fastconv::emulator::current->block_size)
#define gridDim (::fastconv::emulator::current->grid_size)
inline constexpr int warpSize = 32;

#define FASTCONV_SHARED(name, ...) auto& name = ::fastconv::emulator::static_shared<__VA_ARGS__>([] {})
#define FASTCONV_EXPECT_ALIGNED(pointer, bytes) ::fastconv::emulator::expect_aligned(pointer, bytes)
#define FASTCONV_DYNAMIC_SHARED(name) unsigned char* const name = ::fastconv::emulator::dynamic_shared()

inline void __syncthreads(FASTCONV_HERE) { ::fastconv::emulator::sync_threads(at); }
inline int __syncthreads_or(int value, FASTCONV_HERE) {
  return ::fastconv::emulator::sync_threads_reduce(value != 0, [](int a, int b) { return a | b; }, at);
}
inline int __syncthreads_and(int value, FASTCONV_HERE) {
  return ::fastconv::emulator::sync_threads_reduce(value != 0, [](int a, int b) { return a & b; }, at);
}
inline int __syncthreads_count(int value, FASTCONV_HERE) {
  return ::fastconv::emulator::sync_threads_reduce(value != 0, [](int a, int b) { return a + b; }, at);
}
inline void __syncwarp(unsigned mask = ~0u, FASTCONV_HERE) { ::fastconv::emulator::sync_warp(mask, at); }
inline void __threadfence() { ::fastconv::emulator::thread_fence(); }
inline void __threadfence_block() { ::fastconv::emulator::thread_fence(); }
inline void __nanosleep(unsigned, FASTCONV_HERE) { ::fastconv::emulator::yield(at); }
[[noreturn]] inline void __trap(FASTCONV_HERE) { ::fastconv::emulator::fail(at, "__trap()"); }

// ---------------------------------------------------------------- shuffles and votes

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FASTCONV_HERE) {
  const int lane = ::fastconv::emulator::lane_index();
  return ::fastconv::emulator::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, FASTCONV_HERE) {
  const int lane = ::fastconv::emulator::lane_index(), source = lane ^ distance;
  // CUDA lets a lane read from lower segments, not from higher ones.
  const bool inside = source < (lane & -width) + width;
  return ::fastconv::emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, FASTCONV_HERE) {
  const int lane = ::fastconv::emulator::lane_index();
  const bool inside = (lane & (width - 1)) + distance < width;
  return ::fastconv::emulator::shuffle("__shfl_down_sync", mask, value, inside ? lane + distance : lane, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, FASTCONV_HERE) {
  const int lane = ::fastconv::emulator::lane_index();
  const bool inside = (lane & (width - 1)) >= distance;
  return ::fastconv::emulator::shuffle("__shfl_up_sync", mask, value, inside ? lane - distance : lane, at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTCONV_HERE) {
  return ::fastconv::emulator::vote("__ballot_sync", mask, predicate != 0, at);
}
inline int __any_sync(unsigned mask, int predicate, FASTCONV_HERE) {
  return ::fastconv::emulator::vote("__any_sync", mask, predicate != 0, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FASTCONV_HERE) {
  return ::fastconv::emulator::vote("__all_sync", mask, predicate == 0, at) == 0;
}
inline unsigned __activemask() { return ::fastconv::emulator::active_mask(); }

// ---------------------------------------------------------------- atomics

#define FASTCONV_ATOMIC(name, operation)                                                                              \
  template <class T>                                                                                                  \
  T name(T* pointer, std::type_identity_t<T> operand, FASTCONV_HERE) {                                                \
    return ::fastconv::emulator::atomic(::fastconv::emulator::AtomicOperation::operation, pointer, operand, T{}, at); \
  }
FASTCONV_ATOMIC(atomicAdd, add)
FASTCONV_ATOMIC(atomicMin, minimum)
FASTCONV_ATOMIC(atomicMax, maximum)
FASTCONV_ATOMIC(atomicExch, exchange)
FASTCONV_ATOMIC(atomicAnd, bit_and)
FASTCONV_ATOMIC(atomicOr, bit_or)
#undef FASTCONV_ATOMIC
template <class T>
T atomicCAS(T* pointer, std::type_identity_t<T> expected, std::type_identity_t<T> operand, FASTCONV_HERE) {
  return ::fastconv::emulator::atomic(::fastconv::emulator::AtomicOperation::compare_exchange, pointer, operand,
                                      expected, at);
}

#include "emulator/intrinsics.h"
