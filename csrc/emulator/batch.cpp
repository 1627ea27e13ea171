// Setting up the blocks that run together, and what must be in order when one of their threads ends.
#include <algorithm>
#include <cstring>

#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

template <class T>
void resize(std::vector<std::unique_ptr<T>>& items, size_t count) {
  items.resize(count);
  for (auto& item : items)
    if (!item) item = std::make_unique<T>();
}

void reset(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.reduced = 0;
  barrier.in.clear();
  barrier.out.clear();
}

void prepare_warps(Block& block, unsigned threads, uint32_t& agent) {
  const unsigned warps = (threads + 31) / 32;
  // The pool is what the block was launched with: as many registers a thread as fit, in steps of 8, at most 255.
  const unsigned registers = std::min(65536 / threads, 255u) & ~7u;
  block.registers_free = 0;
  resize(block.warps, warps);
  for (unsigned i = 0; i < warps; ++i) {
    Warp& warp = *block.warps[i];
    warp.block = &block;
    warp.index = i;
    warp.lanes = std::min(32u, threads - 32 * i);
    warp.registers = registers;
    warp.exited = 0;
    warp.barriers.clear();
    warp.wgmma = {};
    warp.matrix_stores.clear();
    warp.matrix_stores_done = 0;
    warp.wgmma_agent = agent++;
    warp.bulk_agent = agent++;
  }
}

void prepare_block(Block& block, const Grid& grid, uint64_t number, uint32_t& agent) {
  const unsigned threads = grid.threads.x * grid.threads.y * grid.threads.z;
  block.number = static_cast<unsigned>(number);
  block.id = dim3(number % grid.blocks.x, number / grid.blocks.x % grid.blocks.y,
                  static_cast<unsigned>(number / grid.blocks.x / grid.blocks.y));
  block.alive = threads;
  for (Barrier& barrier : block.barriers) reset(barrier);
  block.mbarriers.clear();
  block.mbarrier_at.clear();
  prepare_shared(block, grid);
  prepare_warps(block, threads, agent);
}

void prepare_thread(Thread& thread, Block& block, const Grid& grid, unsigned index) {
  thread.thread = {index % grid.threads.x, index / grid.threads.x % grid.threads.y,
                   index / grid.threads.x / grid.threads.y};
  thread.block = {block.id.x, block.id.y, block.id.z};
  thread.block_size = grid.threads;
  thread.grid_size = grid.blocks;
  thread.home = &block;
  thread.warp = block.warps[index / 32].get();
  thread.fiber = nullptr;
  thread.index = index;
  thread.lane = index % 32;
  thread.done = thread.polling = false;
  thread.wait_word = nullptr;
  if (thread.has_extras) *thread.storage = {};
  thread.has_extras = false;
}

/// Warps in a random order (seed 0: in their own), lanes in theirs.
void choose_order(Batch& batch, unsigned threads_per_block) {
  batch.order.clear();
  struct WarpOfBlock {
    uint32_t first, lanes;
  };
  std::vector<WarpOfBlock> warps;
  for (size_t block = 0; block < batch.blocks.size(); ++block)
    for (const auto& warp : batch.blocks[block]->warps)
      warps.push_back({static_cast<uint32_t>(block * threads_per_block + 32 * warp->index), warp->lanes});
  if (options().seed != 0)
    for (size_t i = warps.size(); i > 1; --i) std::swap(warps[i - 1], warps[batch.random() % i]);
  for (const WarpOfBlock& warp : warps)
    for (uint32_t lane = 0; lane < warp.lanes; ++lane) batch.order.push_back(batch.threads[warp.first + lane].get());
}

void prepare_clocks(Batch& batch, uint32_t agents) {
  batch.agents = agents + kMbarriersPerBlock * static_cast<uint32_t>(batch.blocks.size());
  for (auto& block : batch.blocks) {
    block->first_mbarrier_agent = agents;
    agents += kMbarriersPerBlock;
    block->cells.clear();
    block->cells.resize((kSharedLimit + 1024) / 4);
  }
  for (auto& thread : batch.threads) {
    thread->clocks().now.resize(batch.agents);
    thread->clocks().now[thread->agent] = 1;
  }
  begin_race_batch();
}

}  // namespace

void prepare_batch(Batch& batch, const Grid& grid, const std::function<void()>& body, uint64_t first, unsigned count) {
  const unsigned threads = grid.threads.x * grid.threads.y * grid.threads.z;
  batch.grid = &grid;
  batch.body = &body;
  batch.random_state = options().seed * 7919u + first + 1;
  batch.pending.clear();
  batch.error.clear();
  batch.started = 0;
  batch.alive = threads * count;
  resize(batch.blocks, count);
  resize(batch.threads, size_t{threads} * count);
  resize(batch.clusters, count / grid.cluster);
  uint32_t agent = threads * count;
  for (unsigned i = 0; i < count; ++i) {
    Block& block = *batch.blocks[i];
    Cluster& cluster = *batch.clusters[i / grid.cluster];
    prepare_block(block, grid, first + i, agent);
    block.rank = i % grid.cluster;
    block.cluster = &cluster;
    if (block.rank == 0) {
      cluster.first = &block;
      cluster.size = grid.cluster;
      cluster.alive = threads * grid.cluster;
      cluster.arrival_phase.clear();
      reset(cluster.barrier);
    }
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = *batch.threads[size_t{i} * threads + t];
      prepare_thread(thread, block, grid, t);
      thread.agent = i * threads + t;
    }
  }
  choose_order(batch, threads);
  if (options().check_races) prepare_clocks(batch, agent);
}

static void require_nothing_in_flight(Thread& thread) {
  const Location at = thread.wait_at;
  if (!thread.extras().copies.empty())
    fail(at, "a thread exits with %zu cp.async that it has not waited for; end with cp_async_wait_group<0>()",
         thread.extras().copies.size());
  const WgmmaQueue& queue = thread.warp->wgmma;
  for (const WgmmaOperation& operation : queue.operations)
    if (!operation.commit) fail(operation.at, "a warp exits with wgmma in flight; end with wgmma_wait_group<0>()");
  for (const TmaOperation& operation : worker->batch.pending) {
    if (operation.store && operation.issuer == &thread && operation.staged.empty())
      fail(operation.at, "a thread exits before its bulk store was read; end with cp_async_bulk_wait_group_read<0>()");
    if (operation.store || thread.home->alive > 1) continue;
    for (const Block* destination : operation.destinations)
      if (destination == thread.home) fail(operation.at, "a block exits with this TMA load in flight");
  }
}

void finish_thread(Thread& thread) {
  Block& block = *thread.home;
  if (thread.has_extras || !worker->batch.pending.empty()) require_nothing_in_flight(thread);
  thread.done = true;
  thread.warp->exited |= 1u << thread.lane;
  --block.alive;
  --block.cluster->alive;
  --worker->batch.alive;
  recheck(block.barriers[0], block.alive);
  recheck(block.cluster->barrier, block.cluster->alive);
  for (auto& warp_barrier : thread.warp->barriers)
    recheck(warp_barrier->barrier, std::popcount(warp_barrier->mask & ~thread.warp->exited));
}

}  // namespace fastconv::emulator
