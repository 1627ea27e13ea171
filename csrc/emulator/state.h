// What the emulator keeps for a kernel in execution. Shared by its own sources; kernels never see it.
//
//   Worker   one OS thread: its fibers, and the batch it runs
//   Batch    the blocks that run together: a cluster, or the whole grid of a cooperative launch
//   Block    shared memory, barriers, warps
//   Warp     what its lanes do together: collectives, wgmma, stmatrix
//   Thread   identity, what it waits for, its asynchronous copies
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator/builtins.h"
#include "emulator/fiber.h"
#include "emulator/race.h"
#include "emulator/run.h"
#include "emulator/tma.h"
#include "emulator/wgmma.h"

namespace fastconv::emulator {

/// NaN in fp16, bf16 and fp32: what shared memory holds before it is written.
constexpr uint32_t kPoison = 0x7fff7fff;
/// Shared-memory addresses start here, as on sm_90, where the first KB is the system's.
constexpr uint32_t kSharedWindow = 1024;
constexpr uint32_t kSharedLimit = 227 << 10;  // of any device
constexpr uint32_t kStaticLimit = 48 << 10;
constexpr unsigned kMbarriersPerBlock = 64;

struct Block;
struct Thread;
struct Warp;

struct Barrier {
  unsigned arrived = 0;
  uint32_t phase = 0;
  int reduced = 0, result = 0;  // __syncthreads_or and its like
  Clock in, out;
};

struct Mbarrier {
  uint32_t address = 0, count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // announced and not yet landed; negative if they landed first
  uint32_t agent = 0;
  const Thread* initialiser = nullptr;
  bool fenced = false;  // its initialiser has executed fence_mbarrier_init since
  Clock in, out;
};

struct AsyncCopy {
  uint32_t destination;
  const void* source;
  uint32_t bytes, source_bytes;
  Location at;
};

/// An arrival or multicast from another block of the cluster.
struct RemoteAccess {
  uint32_t agent, clock;
  Location at;
};

struct Fiber;

/// What most threads of most kernels never touch.
struct ThreadExtras {
  std::vector<AsyncCopy> copies;
  std::vector<size_t> copy_groups;  // where each committed group ends in `copies`
  unsigned bulk_group = 0, bulk_done = 0;
  uint64_t wgmma_sequence = 0, stmatrix_sequence = 0;
  bool wgmma_fenced = false;
  ThreadClocks clocks;
};

/// Small: a block of a simple kernel is mostly the cost of going through these.
struct Thread : Identity {
  Block* home = nullptr;
  Warp* warp = nullptr;
  Fiber* fiber = nullptr;  // null before the first run
  unsigned index = 0, lane = 0;
  uint32_t agent = 0;
  bool done = false, polling = false;

  // Blocked while (*word & mask) == value, so that the scheduler can look without switching.
  const uint32_t* wait_word = nullptr;
  uint32_t wait_mask = 0, wait_value = 0, wait_argument = 0;
  const char* wait_what = "";
  Location wait_at;

  bool has_extras = false;
  std::unique_ptr<ThreadExtras> storage;

  ThreadExtras& extras() {
    if (!storage) storage = std::make_unique<ThreadExtras>();
    has_extras = true;
    return *storage;
  }
  ThreadClocks& clocks() { return extras().clocks; }
};

struct WarpBarrier {
  unsigned mask;
  Barrier barrier;
  const char* name = "";
  Location at;
  void* operands[32];
};

struct MatrixStore {
  unsigned lanes = 0;
  bool transposed = false;
  uint32_t address[32], fragment[32][4];
};

struct Warp {
  Block* block = nullptr;
  unsigned index = 0, lanes = 0, registers = 0;
  uint32_t exited = 0;
  std::vector<std::unique_ptr<WarpBarrier>> barriers;  // one per mask that was used
  WgmmaQueue wgmma;
  std::deque<MatrixStore> matrix_stores;
  uint64_t matrix_stores_done = 0;
  uint32_t wgmma_agent = 0, bulk_agent = 0;
};

struct Cluster {
  unsigned alive = 0;
  Block* first = nullptr;
  unsigned size = 0;
  Barrier barrier;
  std::vector<uint32_t> arrival_phase;  // by thread of the cluster: barrier_cluster_arrive without its wait
};

struct StaticArray {
  const void* key;
  uint32_t offset, bytes;
};

struct Block {
  dim3 id;
  unsigned rank = 0, number = 0, alive = 0;
  Cluster* cluster = nullptr;
  unsigned char* shared = nullptr;  // at address kSharedWindow
  uint32_t dynamic_begin = 0, shared_end = 0;
  std::vector<StaticArray> statics;
  uint64_t shared_version = 0;  // grows when something other than a plain store writes shared memory
  uint32_t registers_free = 0;
  uint32_t register_changes = 0;
  Barrier barriers[16];
  std::vector<std::unique_ptr<Warp>> warps;
  std::deque<Mbarrier> mbarriers;
  std::vector<int16_t> mbarrier_at;  // by address / 8: number in `mbarriers`, or -1; empty until the first init
  uint32_t first_mbarrier_agent = 0;
  std::vector<ShadowCell> cells;
  std::vector<RemoteAccess> remote_accesses;  // kept where races are checked
  Clock exits;                                // joined from its threads as they end
  std::unique_ptr<unsigned char[]> memory;
};

struct Batch {
  const Grid* grid = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> order;  // in which the scheduler visits them
  size_t started = 0;          // how many of `order` have begun
  unsigned alive = 0;
  uint32_t agents = 0;
  std::deque<TmaOperation> pending;
  std::string error;
  uint64_t random_state = 1;

  unsigned random() {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>(random_state >> 33);
  }
};

struct Fiber {
  Stack stack;
  Context context;
  unsigned number = 0;
  bool idle = false;
};

struct Worker {
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Fiber* running = nullptr;
  Batch batch;
  OperandCache operand_cache;
  uint64_t switches = 0, tma_operations = 0, wgmma_warps = 0;
};

extern constinit thread_local Worker* worker;
inline Thread& self() { return static_cast<Thread&>(*current); }

// ---------------------------------------------------------------- scheduler.cpp
void run_batch(Worker& worker);
[[noreturn]] void abandon_fiber();
void block_until(const uint32_t* word, uint32_t mask, uint32_t value, const char* what, uint32_t argument, Location at);

// ---------------------------------------------------------------- batch.cpp
/// Makes the worker's batch that of the given blocks, first to first + count - 1 in the grid's order.
void prepare_batch(Batch& batch, const Grid& grid, const std::function<void()>& body, uint64_t first, unsigned count);
/// What must be in order when a thread returns from its kernel.
void finish_thread(Thread& thread);

// ---------------------------------------------------------------- report.cpp
std::string describe(Location at);
std::string describe(const Thread& thread);
std::string deadlock_report(const Batch& batch);

// ---------------------------------------------------------------- barriers.cpp
/// True if this arrival completed the phase.
bool arrive(Barrier& barrier, unsigned expected);
void arrive_and_wait(Barrier& barrier, unsigned expected, const char* what, uint32_t argument, Location at);
/// A barrier that counts live threads may be complete once one has gone.
void recheck(Barrier& barrier, unsigned expected);

// ---------------------------------------------------------------- shared_memory.cpp
void prepare_shared(Block& block, const Grid& grid);
/// The memory at a shared address of this block, or of the cluster's if `address` came from mapa.
unsigned char* resolve(uint32_t address, uint32_t bytes, const char* what, Location at, Block** owner = nullptr);
void require_aligned(uint32_t address, uint32_t bytes, const char* what, Location at);

// ---------------------------------------------------------------- mbarrier.cpp
/// The barrier at an address, for the calling thread to use.
Mbarrier& find_mbarrier(uint32_t address, Location at);
void update(Mbarrier& barrier);

}  // namespace fastconv::emulator
