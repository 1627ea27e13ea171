// mbarrier: arrivals and bytes complete a phase. Facts 17 to 19 of the Hopper notes (README.md).
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

/// Lies in the barrier's 8 bytes while it lives, so that overwriting one is seen.
constexpr char kMark[] = "mbarrier";

}  // namespace

void mbarrier_init(uint32_t address, uint32_t arrivals, Location at) {
  Block* block = nullptr;
  unsigned char* memory = resolve(address, 8, "mbarrier.init", at, &block);
  if (address % 8 || arrivals == 0)
    fail(at, "mbarrier.init at address %u for %u arrivals, expected a multiple of 8 and at least 1", address, arrivals);
  if (block->mbarrier_at.empty()) block->mbarrier_at.assign((kSharedLimit + 2048) / 8, -1);
  int16_t& number = block->mbarrier_at[((address & 0xffffff) - kSharedWindow) / 8];
  if (number < 0) {
    if (block->mbarriers.size() == kMbarriersPerBlock)
      fail(at, "more than %u mbarriers in a block, which is the emulator's limit", kMbarriersPerBlock);
    number = static_cast<int16_t>(block->mbarriers.size());
    block->mbarriers.emplace_back();
  }
  Mbarrier fresh;
  fresh.address = address & 0xffffff;
  fresh.count = fresh.pending = arrivals;
  fresh.agent = block->first_mbarrier_agent + static_cast<uint32_t>(number);
  if (options().check_races) {
    fresh.in.resize(worker->batch.agents);
    fresh.out.resize(worker->batch.agents);
  }
  block->mbarriers[static_cast<size_t>(number)] = std::move(fresh);
  std::memcpy(memory, kMark, 8);
}

Mbarrier& find_mbarrier(uint32_t address, Location at, Block** owner) {
  Block* block = nullptr;
  const unsigned char* memory = resolve(address, 8, "mbarrier", at, &block);
  const bool known = address % 8 == 0 && !block->mbarrier_at.empty();
  const int number = known ? block->mbarrier_at[((address & 0xffffff) - kSharedWindow) / 8] : -1;
  if (number < 0) fail(at, "shared address %u is not an initialised mbarrier", address & 0xffffff);
  if (std::memcmp(memory, kMark, 8) != 0)
    fail(at, "the mbarrier at shared address %u has been overwritten", address & 0xffffff);
  if (owner) *owner = block;
  return block->mbarriers[static_cast<size_t>(number)];
}

void update(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
  if (!options().check_races) return;
  barrier.out = barrier.in;
  barrier.out[barrier.agent] = barrier.phase;  // the loads of this phase have landed
  std::fill(barrier.in.begin(), barrier.in.end(), 0);
}

void mbarrier_arrive(uint32_t address, uint32_t bytes, Location at) {
  Mbarrier& barrier = find_mbarrier(address, at);
  Thread& thread = self();
  if (barrier.pending == 0)
    fail(at, "an arrival on mbarrier %u, which has all %u of phase %u already (%lld bytes outstanding)",
         barrier.address, barrier.count, barrier.phase, static_cast<long long>(barrier.bytes));
  if (options().check_races) {
    join(barrier.in, thread.clocks().now);
    tick(thread);
  }
  --barrier.pending;
  barrier.bytes += bytes;
  update(barrier);
}

static void acquire(const Mbarrier& barrier) {
  if (options().check_races) join(self().clocks().now, barrier.out);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, Location at) {
  Mbarrier& barrier = find_mbarrier(address, at);
  if ((barrier.phase & 1) != parity) {
    acquire(barrier);
    return true;
  }
  yield(at);
  return false;
}

void mbarrier_wait(uint32_t address, uint32_t parity, Location at) {
  Mbarrier& barrier = find_mbarrier(address, at);
  if (parity > 1) fail(at, "a wait for parity %u of an mbarrier, expected 0 or 1", parity);
  block_until(&barrier.phase, 1, parity, "mbarrier", barrier.address | (address & 0xff000000), at);
  acquire(barrier);
}

}  // namespace fastconv::emulator
