// Barriers of threads: __syncthreads, named, warp, cluster; warp collectives; setmaxnreg.
#include <bit>

#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {

bool arrive(Barrier& barrier, unsigned expected) {
  Thread& thread = self();
  if (options().check_races) {
    if (barrier.in.empty()) barrier.in.resize(worker->batch.agents);
    join(barrier.in, thread.clocks().now);
    tick(thread);
  }
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  ++barrier.phase;
  if (options().check_races) {
    barrier.out = barrier.in;
    std::fill(barrier.in.begin(), barrier.in.end(), 0);
  }
  return true;
}

void arrive_and_wait(Barrier& barrier, unsigned expected, const char* what, uint32_t argument, Location at) {
  const uint32_t phase = barrier.phase;
  if (!arrive(barrier, expected)) block_until(&barrier.phase, ~0u, phase, what, argument, at);
  if (options().check_races) join(self().clocks().now, barrier.out);
}

void recheck(Barrier& barrier, unsigned expected) {
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier.arrived = 0;
  ++barrier.phase;
  barrier.result = barrier.reduced;
  barrier.reduced = 0;
  barrier.out = barrier.in;
  std::fill(barrier.in.begin(), barrier.in.end(), 0);
}

// ---------------------------------------------------------------- of a block

void sync_threads(Location at) {
  Block& block = *self().home;
  arrive_and_wait(block.barriers[0], block.alive, "__syncthreads", 0, at);
}

int sync_threads_reduce(int value, int (*combine)(int, int), Location at) {
  Block& block = *self().home;
  Barrier& barrier = block.barriers[0];
  barrier.reduced = barrier.arrived == 0 ? value : combine(barrier.reduced, value);
  if (barrier.arrived + 1 >= block.alive) barrier.result = barrier.reduced;
  arrive_and_wait(barrier, block.alive, "__syncthreads", 0, at);
  return barrier.result;
}

static Barrier& named_barrier(int number, int threads, Location at) {
  if (number < 0 || number > 15 || threads <= 0 || threads % 32 != 0)
    fail(at, "named barrier %d over %d threads: expected 0 to 15 and a multiple of 32", number, threads);
  return self().home->barriers[number];
}

void bar_sync(int number, int threads, Location at) {
  Barrier& barrier = named_barrier(number, threads, at);
  arrive_and_wait(barrier, static_cast<unsigned>(threads), "named barrier", static_cast<uint32_t>(number), at);
}

void bar_arrive(int number, int threads, Location at) {
  arrive(named_barrier(number, threads, at), static_cast<unsigned>(threads));
}

// ---------------------------------------------------------------- of a cluster

static uint32_t& cluster_arrival(Thread& thread) {
  Cluster& cluster = *thread.home->cluster;
  const unsigned threads =
      worker->batch.grid->threads.x * worker->batch.grid->threads.y * worker->batch.grid->threads.z;
  if (cluster.arrival_phase.empty()) cluster.arrival_phase.resize(size_t{threads} * cluster.size, ~0u);
  return cluster.arrival_phase[thread.home->rank * threads + thread.index];
}

void barrier_cluster_arrive(Location at) {
  Thread& thread = self();
  uint32_t& phase = cluster_arrival(thread);
  if (phase != ~0u) fail(at, "barrier.cluster.arrive twice without barrier.cluster.wait");
  Cluster& cluster = *thread.home->cluster;
  phase = cluster.barrier.phase;
  arrive(cluster.barrier, cluster.alive);
}

void barrier_cluster_wait(Location at) {
  Thread& thread = self();
  uint32_t& phase = cluster_arrival(thread);
  if (phase == ~0u) fail(at, "barrier.cluster.wait without barrier.cluster.arrive");
  Barrier& barrier = thread.home->cluster->barrier;
  block_until(&barrier.phase, ~0u, phase, "cluster barrier", 0, at);
  phase = ~0u;
  if (options().check_races) join(thread.clocks().now, barrier.out);
}

uint32_t cluster_rank() { return self().home->rank; }

// ---------------------------------------------------------------- of a warp

int lane_index() { return static_cast<int>(self().lane); }

static uint32_t present(const Warp& warp) { return (warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1) & ~warp.exited; }

unsigned active_mask() { return present(*self().warp); }

static WarpBarrier& warp_barrier(unsigned mask) {
  Warp& warp = *self().warp;
  for (auto& known : warp.barriers)
    if (known->mask == mask) return *known;
  warp.barriers.push_back(std::make_unique<WarpBarrier>());
  WarpBarrier& fresh = *warp.barriers.back();
  fresh.mask = mask;
  return fresh;
}

void warp_collective(const char* name, unsigned mask, void* operands, Combine combine, Location at) {
  Thread& thread = self();
  if (!(mask >> thread.lane & 1))
    fail(at, "%s with mask %08x, which lacks lane %u that calls it", name, mask, thread.lane);
  WarpBarrier& meeting = warp_barrier(mask);
  Barrier& barrier = meeting.barrier;
  if (barrier.arrived == 0) {
    meeting.name = name;
    meeting.at = at;
    std::fill(std::begin(meeting.operands), std::end(meeting.operands), nullptr);
  } else if (std::string_view(meeting.name) != name) {
    fail(at, "the lanes of a warp disagree: %s here, %s at %s", name, meeting.name, describe(meeting.at).c_str());
  }
  meeting.operands[thread.lane] = operands;
  const auto expected = static_cast<unsigned>(std::popcount(mask & present(*thread.warp)));
  if (combine && barrier.arrived + 1 >= expected) combine(meeting.operands, at);
  arrive_and_wait(barrier, expected, name, mask, at);
}

void sync_warp(unsigned mask, Location at) { warp_collective("__syncwarp", mask, nullptr, nullptr, at); }

void combine_shuffle(void* const (&operands)[32], Location) {
  for (void* operand : operands) {
    if (!operand) continue;
    auto& mine = *static_cast<Shuffle*>(operand);
    const auto* source = static_cast<const Shuffle*>(operands[mine.source & 31]);
    mine.result = source ? source->value : uint64_t{kPoison} << 32 | kPoison;  // a lane that is not there
  }
}

void combine_vote(void* const (&operands)[32], Location) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (operands[lane] && static_cast<const Vote*>(operands[lane])->predicate) ballot |= 1u << lane;
  for (void* operand : operands)
    if (operand) static_cast<Vote*>(operand)->ballot = ballot;
}

// ---------------------------------------------------------------- registers

/// All lanes of a warp give registers back to the block's pool or wait until it has enough.
void set_max_registers(unsigned registers, bool increase, Location at) {
  warp_collective("setmaxnreg", ~0u, nullptr, nullptr, at);
  Warp& warp = *self().warp;
  Block& block = *warp.block;
  while (warp.registers != registers) {
    if (increase != (registers > warp.registers))
      fail(at, "setmaxnreg.%s to %u registers, and the warp has %u", increase ? "inc" : "dec", registers,
           warp.registers);
    if (increase && block.registers_free < 32 * (registers - warp.registers)) {
      block_until(&block.register_changes, ~0u, block.register_changes, "setmaxnreg.inc to", registers, at);
      continue;
    }
    block.registers_free += 32 * (warp.registers - registers);  // modulo 2^32
    warp.registers = registers;
    ++block.register_changes;
  }
}

}  // namespace fastconv::emulator
