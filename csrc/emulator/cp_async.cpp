// cp.async: copies of 4, 8 or 16 bytes from global to shared memory, in groups per thread.
//
// In lazy timing a copy happens at the wait that covers it. From issue to completion its destination holds NaN.
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {

static void complete(const AsyncCopy& copy) {
  unsigned char* to = resolve(copy.destination, copy.bytes, "cp.async", copy.at);
  std::memcpy(to, copy.source, copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  ++self().home->shared_version;
  // Who reads the destination between issue and wait conflicts with this write, if not with that at the issue.
  check_shared(copy.destination, copy.bytes, Access::write, "cp.async", copy.at);
}

void cp_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes, Location at) {
  Thread& thread = self();
  require_aligned(destination, bytes, "cp.async", at);
  if (source_bytes > bytes) fail(at, "cp.async of %u bytes from a source of %u", bytes, source_bytes);
  if (reinterpret_cast<uintptr_t>(source) % bytes)
    fail(at, "cp.async: the source %p is not aligned to %u bytes", source, bytes);
  unsigned char* to = resolve(destination, bytes, "cp.async", at);
  for (uint32_t i = 0; i < bytes; i += 4) std::memcpy(to + i, &kPoison, 4);
  check_shared(destination, bytes, Access::write, "cp.async", at);
  if (options().check_races && source_bytes)
    check_global(source, source_bytes, Access::read, actor(thread), {"cp.async", at});
  const AsyncCopy copy{destination, source, bytes, source_bytes, at};
  const Timing timing = options().timing;
  if (timing == Timing::eager || (timing == Timing::random && worker->batch.random() % 2)) complete(copy);
  else thread.extras().copies.push_back(copy);
}

void cp_async_commit_group() {
  ThreadExtras& extras = self().extras();
  extras.copy_groups.push_back(extras.copies.size());
}

void cp_async_wait_group(unsigned pending) {
  ThreadExtras& extras = self().extras();
  if (extras.copy_groups.size() <= pending) return;
  const size_t groups = extras.copy_groups.size() - pending, copies = extras.copy_groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) complete(extras.copies[i]);
  extras.copies.erase(extras.copies.begin(), extras.copies.begin() + static_cast<std::ptrdiff_t>(copies));
  extras.copy_groups.erase(extras.copy_groups.begin(),
                           extras.copy_groups.begin() + static_cast<std::ptrdiff_t>(groups));
  for (size_t& end : extras.copy_groups) end -= copies;
}

}  // namespace fastconv::emulator
