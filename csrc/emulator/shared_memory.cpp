// Shared memory of a block: its budget, its addresses, loads and stores by address.
//
//   1024 + misalignment   dynamic memory, as many bytes as the launch asked for
//   then                  static arrays, in the order in which the kernel first reaches their declarations
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FASTCONV_FORBID(pointer, bytes) __asan_poison_memory_region(pointer, bytes)
#define FASTCONV_PERMIT(pointer, bytes) __asan_unpoison_memory_region(pointer, bytes)
#else
#define FASTCONV_FORBID(pointer, bytes) (void)0
#define FASTCONV_PERMIT(pointer, bytes) (void)0
#endif

namespace fastconv::emulator {
namespace {

constexpr uint32_t kMemoryBytes = kSharedLimit + 2048;

void fill_with_poison(unsigned char* to, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<unsigned char>(kPoison >> i % 4 * 8);
}

}  // namespace

void prepare_shared(Block& block, const Grid& grid) {
  if (!block.memory) {
    block.memory.reset(new unsigned char[kMemoryBytes + 1024]);
    const auto raw = reinterpret_cast<uintptr_t>(block.memory.get());
    block.shared = block.memory.get() + (1024 - raw % 1024) % 1024;  // pointers are as aligned as their addresses
  }
  block.dynamic_begin = grid.shared_bytes ? options().shared_misalignment : 0;
  block.shared_end = block.dynamic_begin + static_cast<uint32_t>(grid.shared_bytes);
  block.statics.clear();
  FASTCONV_FORBID(block.shared, kMemoryBytes);
  FASTCONV_PERMIT(block.shared + block.dynamic_begin, grid.shared_bytes);
  fill_with_poison(block.shared + block.dynamic_begin, grid.shared_bytes);
}

unsigned char* dynamic_shared() {
  Block& block = *self().home;
  return block.shared + block.dynamic_begin;
}

void* static_shared(const void* key, size_t bytes, size_t alignment, Location at) {
  Block& block = *self().home;
  for (const StaticArray& known : block.statics)
    if (known.key == key) return block.shared + known.offset;
  const auto size = static_cast<uint32_t>(bytes), step = static_cast<uint32_t>(alignment);
  // 16 bytes between arrays stay forbidden: AddressSanitizer sees an index past the end of one.
  const uint32_t offset = (block.shared_end + 16 + step - 1) & ~(step - 1);
  uint32_t total = size;
  for (const StaticArray& known : block.statics) total += known.bytes;
  if (total > kStaticLimit)
    fail(at, "%u bytes of static shared memory, expected at most %u; use FASTCONV_DYNAMIC_SHARED", total, kStaticLimit);
  if (offset + size > kMemoryBytes || total + worker->batch.grid->shared_bytes > shared_limit())
    fail(at, "%u bytes of static and %zu of dynamic shared memory, expected at most %u together", total,
         worker->batch.grid->shared_bytes, shared_limit());
  block.shared_end = offset + size;
  block.statics.push_back({key, offset, size});
  FASTCONV_PERMIT(block.shared + offset, size);
  fill_with_poison(block.shared + offset, size);
  return block.shared + offset;
}

uint32_t shared_address(const void* pointer) {
  Block& block = *self().home;
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset < 0 || offset > block.shared_end)
    fail(Location::current(), "shared_address of a pointer that is not into this block's shared memory");
  return kSharedWindow + static_cast<uint32_t>(offset);
}

uint32_t map_address(uint32_t address, uint32_t rank, Location at) {
  const unsigned size = self().home->cluster->size;
  if (rank >= size) fail(at, "mapa to rank %u of a cluster of %u blocks", rank, size);
  return (address & 0xffffff) | (rank + 1) << 24;
}

unsigned char* resolve(uint32_t address, uint32_t bytes, const char* what, Location at, Block** owner) {
  Block* block = self().home;
  if (address >> 24) {
    const Cluster& cluster = *block->cluster;
    const unsigned rank = (address >> 24) - 1;
    for (auto& candidate : worker->batch.blocks)
      if (candidate->cluster == &cluster && candidate->rank == rank) block = candidate.get();
  }
  const uint32_t offset = (address & 0xffffff) - kSharedWindow;
  if (offset < block->dynamic_begin || uint64_t{offset} + bytes > block->shared_end)
    fail(at, "%s: shared address %u and %u bytes from there, but the block has %u to %u", what, address & 0xffffff,
         bytes, kSharedWindow + block->dynamic_begin, kSharedWindow + block->shared_end);
  if (block->alive == 0) fail(at, "%s: the block of rank %u in the cluster has exited", what, block->rank);
  if (owner) *owner = block;
  return block->shared + offset;
}

void require_aligned(uint32_t address, uint32_t bytes, const char* what, Location at) {
  if (address % bytes) fail(at, "%s: shared address %u is not aligned to %u bytes", what, address & 0xffffff, bytes);
}

void store_shared(uint32_t address, const void* value, uint32_t bytes, Location at) {
  require_aligned(address, bytes, "st.shared", at);
  std::memcpy(resolve(address, bytes, "st.shared", at), value, bytes);
  ++self().home->shared_version;
  check_shared(address, bytes, Access::write, "st.shared", at);
}

void load_shared(uint32_t address, void* value, uint32_t bytes, Location at) {
  require_aligned(address, bytes, "ld.shared", at);
  std::memcpy(value, resolve(address, bytes, "ld.shared", at), bytes);
  check_shared(address, bytes, Access::read, "ld.shared", at);
}

}  // namespace fastconv::emulator
