// Runs the threads of a batch on fibers, and the batches of a grid on OS threads.
//
// A fiber takes a thread that has not started, runs it to its end and takes the next: a kernel that never waits costs
// one fiber and no switches. A thread that must wait keeps its fiber, and the scheduler starts another one.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "emulator/state.h"

namespace fastconv::emulator {

constinit thread_local Identity* current = nullptr;
constinit thread_local Worker* worker = nullptr;

Options& options() {
  static Options instance;
  return instance;
}

Statistics& statistics() {
  static Statistics instance;
  return instance;
}

// ---------------------------------------------------------------- fibers

namespace {

void fiber_main() {
  Worker& mine = *worker;
  arrived_on_fiber(mine.scheduler);
  Fiber& fiber = *mine.running;
  for (;;) {
    Batch& batch = mine.batch;
    while (batch.started < batch.order.size()) {
      Thread& thread = *batch.order[batch.started++];
      thread.fiber = &fiber;
      current = &thread;
      try {
        (*batch.body)();
        finish_thread(thread);
      } catch (const std::exception& failure) {  // nothing may unwind past the end of the fiber
        batch.error = describe(thread) + ": " + failure.what();
        abandon_fiber();
      }
    }
    fiber.idle = true;
    mine.idle.push_back(&fiber);
    switch_context(fiber.context, mine.scheduler);
  }
}

void resume(Worker& mine, Fiber& fiber) {
  fiber.idle = false;
  mine.running = &fiber;
  ++mine.switches;
  switch_context(mine.scheduler, fiber.context);
  mine.running = nullptr;
  current = nullptr;
}

Fiber& take_idle_fiber(Worker& mine) {
  if (mine.idle.empty()) {
    auto fiber = std::make_unique<Fiber>();
    fiber->number = static_cast<unsigned>(mine.fibers.size());
    prepare(fiber->context, fiber->stack, fiber_main, fiber->number * 17);
    mine.idle.push_back(fiber.get());
    mine.fibers.push_back(std::move(fiber));
  }
  Fiber& fiber = *mine.idle.back();
  mine.idle.pop_back();
  return fiber;
}

/// After an error fibers stand in the middle of kernels; nothing there has a destructor that matters.
void restart_fibers(Worker& mine) {
  mine.idle.clear();
  for (auto& fiber : mine.fibers) {
    prepare(fiber->context, fiber->stack, fiber_main, fiber->number * 17);
    mine.idle.push_back(fiber.get());
  }
}

/// Runs what can run. True if anything got further.
bool run_threads(Worker& mine) {
  Batch& batch = mine.batch;
  bool progress = false;
  while (batch.started < batch.order.size() && batch.error.empty()) {
    resume(mine, take_idle_fiber(mine));
    progress = true;
  }
  for (Thread* thread : batch.order) {
    if (!batch.error.empty()) return true;
    if (thread->done) continue;
    if (thread->wait_word && (*thread->wait_word & thread->wait_mask) == thread->wait_value) continue;
    const bool polled = thread->polling;
    thread->polling = false;
    current = thread;
    resume(mine, *thread->fiber);
    progress |= !(polled && thread->polling);
  }
  return progress;
}

void run_pending(Batch& batch, size_t index) {
  TmaOperation operation = std::move(batch.pending[index]);
  batch.pending.erase(batch.pending.begin() + static_cast<std::ptrdiff_t>(index));
  execute(operation);
}

/// Completes one TMA operation: `any` at random, else the oldest load (a store's time is its wait). False if none.
bool run_one_pending(Batch& batch, bool any) {
  const size_t begin = any && !batch.pending.empty() ? batch.random() % batch.pending.size() : 0;
  for (size_t i = begin; i < batch.pending.size(); ++i)
    if (any || !batch.pending[i].store) {
      run_pending(batch, i);
      return true;
    }
  return false;
}

bool anyone_polls(const Batch& batch) {
  return std::any_of(batch.order.begin(), batch.order.end(),
                     [](const Thread* thread) { return !thread->done && thread->polling; });
}

}  // namespace

void abandon_fiber() {
  switch_context(worker->running->context, worker->scheduler);
  __builtin_unreachable();
}

void run_batch(Worker& mine) {
  Batch& batch = mine.batch;
  // A loop that polls for what another thread will write may turn many times; one that turns for ever is a deadlock.
  constexpr int kIdleRounds = 1000;
  int idle_rounds = 0;
  while (batch.alive > 0) {
    const bool progress = run_threads(mine);
    if (!batch.error.empty()) break;
    bool completed = options().timing == Timing::random && batch.random() % 2 && run_one_pending(batch, true);
    if (!progress && !completed) completed = run_one_pending(batch, false);
    if (progress || completed) {
      idle_rounds = 0;
    } else if (++idle_rounds > kIdleRounds || !anyone_polls(batch)) {
      batch.error = deadlock_report(batch);
      break;
    }
  }
  if (!batch.error.empty()) throw std::runtime_error(batch.error);
  while (!batch.pending.empty()) run_pending(batch, 0);  // stores that were waited for with _read only
}

void block_until(const uint32_t* word, uint32_t mask, uint32_t value, const char* what, uint32_t argument,
                 Location at) {
  if ((*word & mask) != value) return;
  Thread& thread = self();
  thread.wait_word = word;
  thread.wait_mask = mask;
  thread.wait_value = value;
  thread.wait_what = what;
  thread.wait_argument = argument;
  thread.wait_at = at;
  switch_context(thread.fiber->context, worker->scheduler);
  thread.wait_word = nullptr;
}

void yield(Location at) {
  Thread& thread = self();
  thread.polling = true;
  thread.wait_what = "polling";
  thread.wait_argument = 0;
  thread.wait_at = at;
  switch_context(thread.fiber->context, worker->scheduler);
}

// ---------------------------------------------------------------- grids

cudaError_t check(const Grid& grid) {
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  if (threads == 0 || threads > 1024 || grid.threads.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.blocks.x > 0x7fffffff || grid.blocks.y > 65535 || grid.blocks.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (grid.cluster == 0 || grid.cluster > 8 || grid.blocks.x % grid.cluster) return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes > shared_limit()) return cudaErrorInvalidValue;
  if (!grid.cooperative) return cudaSuccess;
  // All blocks must be resident at once, as many on each multiprocessor as its threads and shared memory allow.
  const uint64_t by_threads = 2048 / ((threads + 31) / 32 * 32);
  const uint64_t by_shared = (shared_limit() + 1024) / (grid.shared_bytes + 1024);
  const uint64_t blocks = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  const uint64_t fit = static_cast<uint64_t>(options().sm_count) * std::min<uint64_t>({by_threads, by_shared, 32});
  return blocks > fit ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

namespace {

/// Workers keep their stacks from launch to launch.
class WorkerPool {
 public:
  std::unique_ptr<Worker> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (workers_.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> taken = std::move(workers_.back());
    workers_.pop_back();
    return taken;
  }
  void give_back(std::unique_ptr<Worker> given) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Statistics& total = statistics();
    total.switches += std::exchange(given->switches, 0);
    total.tma_operations += std::exchange(given->tma_operations, 0);
    total.wgmma_warps += std::exchange(given->wgmma_warps, 0);
    workers_.push_back(std::move(given));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

WorkerPool& worker_pool() {
  static WorkerPool pool;
  return pool;
}

/// One launch, shared by the OS threads that run its batches.
struct Run {
  const Grid& grid;
  const std::function<void()>& body;
  uint64_t batches;
  unsigned blocks_per_batch;
  std::atomic<uint64_t> next{0};
  std::atomic<uint64_t> first_failed{UINT64_MAX};
  std::mutex mutex;
  std::string error;

  Run(const Grid& grid_, const std::function<void()>& body_, uint64_t batches_, unsigned blocks_per_batch_)
      : grid(grid_), body(body_), batches(batches_), blocks_per_batch(blocks_per_batch_) {}

  void work() {
    std::unique_ptr<Worker> mine = worker_pool().take();
    worker = mine.get();
    for (uint64_t number; (number = next.fetch_add(1)) < batches && number < first_failed;) {
      try {
        prepare_batch(mine->batch, grid, body, number * blocks_per_batch, blocks_per_batch);
        run_batch(*mine);
      } catch (const std::exception& failure) {
        restart_fibers(*mine);
        const std::lock_guard<std::mutex> lock(mutex);
        if (number < first_failed) {  // the lowest failing block is reported, whoever came first
          first_failed = number;
          error = failure.what();
        }
      }
    }
    worker = nullptr;
    worker_pool().give_back(std::move(mine));
  }
};

uint64_t os_threads_for(uint64_t batches) {
  if (options().check_races) return 1;  // the shadow of global memory is one table without locks
  const int asked = options().os_threads;
  const uint64_t allowed = asked > 0 ? asked : std::max(1u, std::thread::hardware_concurrency());
  return std::min(allowed, batches);
}

}  // namespace

void run(const Grid& grid, const std::function<void()>& body) {
  if (worker) throw std::logic_error("a kernel was launched from inside an emulated kernel");
  ++statistics().launches;
  if (options().check_races) forget_global();
  const uint64_t blocks = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  const unsigned per_batch = grid.cooperative ? static_cast<unsigned>(blocks) : grid.cluster;
  Run launch(grid, body, blocks / per_batch, per_batch);
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < os_threads_for(launch.batches); ++i) helpers.emplace_back([&launch] { launch.work(); });
  launch.work();
  for (std::thread& helper : helpers) helper.join();
  if (!launch.error.empty())
    throw std::runtime_error(std::string("emulated kernel ") + grid.kernel + ": " + launch.error);
}

}  // namespace fastconv::emulator
