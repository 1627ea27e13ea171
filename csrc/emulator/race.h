// Happens-before checks (options().check_races): vector clocks over agents.
//
// An agent is whatever touches memory in its own order: each thread, the TMA loads of each mbarrier, the wgmma of each
// warp, the bulk stores of each warp. An agent's clock counts its releases. Thread A's access happens before thread B's
// if B has joined a clock of A that covers it: through __syncthreads, a warp collective, an mbarrier, a fence and a
// flag. Two accesses to the same bytes, one of them a write, not both atomic, of which neither happens before the
// other, are a race, however the threads happened to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator/builtins.h"

namespace fastconv::emulator {

struct Block;
struct Thread;

using Clock = std::vector<uint32_t>;  // by agent; empty where races are not checked

inline void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < other.size(); ++i) into[i] = into[i] > other[i] ? into[i] : other[i];
}

struct ThreadClocks {
  Clock now;
  Clock at_fence;            // `now` at the last __threadfence: what a later atomic of this thread publishes
  Clock pending;             // what atomics of this thread have read; the next __threadfence makes it seen
  uint32_t proxy_fence = 0;  // own clock at the last fence_proxy_async
};

enum class Access : uint8_t { read, write, atomic };
enum class Proxy { generic, asynchronous };

/// Who touches memory, when on its own clock, and what it has seen of others.
struct Actor {
  uint32_t agent, clock;
  const Clock& seen;
};

/// Where in the source: a location, or the machine address of an instrumented load or store.
struct Site {
  const char* what;
  Location at = {};
  const void* instruction = nullptr;
};

struct ShadowRecord {
  uint32_t agent, clock, site, batch;
  uint8_t bytes;  // which of the cell's four
  Access access;
};

/// The last accesses to four bytes.
struct ShadowCell {
  std::vector<ShadowRecord> records;
};

Actor actor(Thread& thread);
void tick(Thread& thread);

void check_shared(Block& block, uint32_t address, uint32_t bytes, Access access, const Actor& who, Proxy proxy,
                  const Site& site);
void check_global(const void* pointer, size_t bytes, Access access, const Actor& who, const Site& site);

/// For threads: does nothing where races are not checked.
void check_shared(uint32_t address, uint32_t bytes, Access access, const char* what, Location at);

/// Forgets the accesses of earlier launches: a launch happens after all of the one before.
void forget_global();
/// Blocks of different batches are ordered by nothing but atomics.
void begin_race_batch();

/// Release and acquire of the calling thread at an atomic on `pointer`.
void synchronise_atomic(const void* pointer);

}  // namespace fastconv::emulator
