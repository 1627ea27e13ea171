// wgmma: asynchronous products of a warpgroup. Facts 13, 14 and 20 of the Hopper notes (README.md).
//
// Each warp has a queue to which its lanes append without waiting. While an accumulator is in flight its values live in
// an Accumulator, and the registers hold a NaN that must not be touched; they come back at the wait that covers the
// last operation on them. In lazy timing operands are read at that wait too: whoever overwrites them earlier is found
// out.
#include <algorithm>
#include <cstring>

#include "emulator/matrix_type.h"
#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

/// In registers whose value is away: a NaN that no computation gives.
constexpr uint32_t kAway = 0x7fc5a5a5;

void save_fragment(Accumulator& accumulator, int lane) {
  float* d = accumulator.registers[lane];
  const int n = accumulator.n;
  for (int i = 0; i < n / 2; ++i) {
    const int row = lane / 4 + i % 4 / 2 * 8, column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    accumulator.values[row * n + column] = d[i];
    std::memcpy(&d[i], &kAway, 4);
  }
}

void restore_fragment(const Accumulator& accumulator, int lane, Location at) {
  float* d = accumulator.registers[lane];
  const int n = accumulator.n;
  for (int i = 0; i < n / 2; ++i) {
    if (std::memcmp(&d[i], &kAway, 4) != 0) fail(at, "an accumulator register was written while wgmma was in flight");
    const int row = lane / 4 + i % 4 / 2 * 8, column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    d[i] = accumulator.values[row * n + column];
  }
}

// ---------------------------------------------------------------- operands in shared memory

struct Descriptor {
  uint32_t start, leading, stride;
  Swizzle swizzle;
};

Descriptor decode(uint64_t bits, Location at) {
  if (bits >> 49 & 7)
    fail(at, "a wgmma descriptor with a base offset: not modelled, and measured to give wrong results");
  const auto field = [bits](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
  const int mode = static_cast<int>(bits >> 62);
  return {field(0), field(16), field(32), mode == 0 ? Swizzle::none : static_cast<Swizzle>(4 - mode)};
}

/// Where element (mn, k) of the operand begins; the layouts are in cuda_support/ptx_wgmma.cuh.
uint32_t element_address(const Descriptor& d, bool mn_major, int bytes, uint32_t mn, uint32_t k) {
  uint32_t address = d.start;
  if (d.swizzle == Swizzle::none) {  // 8 x 16-byte tiles, 128 bytes each
    if (mn_major) address += mn / 8 * d.stride + k / 8 * d.leading + k % 8 * 16 + mn % 8 * bytes;
    else address += mn / 8 * d.stride + k * bytes / 16 * d.leading + mn % 8 * 16 + k * bytes % 16;
    return address;
  }
  const uint32_t row_bytes = swizzle_row_bytes(d.swizzle), panel = row_bytes / 2;
  if (mn_major) address += mn / panel * d.leading + k / 8 * d.stride + k % 8 * row_bytes + mn % panel * bytes;
  else address += mn / 8 * d.stride + mn % 8 * row_bytes + k * bytes;
  return swizzle_address(address, d.swizzle);
}

/// Loads rows [first, first + count) of an operand as out[k][count].
void load_operand(const WgmmaOperation& operation, uint64_t bits, bool mn_major, int first, int count, float* out) {
  const Descriptor descriptor = decode(bits, operation.at);
  const MatrixType type = operation.shape.type;
  const int bytes = element_bytes(type), depth = k_extent(type), per_chunk = 16 / bytes;
  Thread& thread = self();
  Block& block = *thread.home;
  const auto read = [&](int mn, int k) -> const unsigned char* {
    const uint32_t address =
        element_address(descriptor, mn_major, bytes, static_cast<uint32_t>(mn), static_cast<uint32_t>(k));
    const unsigned char* memory = resolve(address, 16, "a wgmma operand", operation.at);
    if (options().check_races)
      check_shared(block, address, 16, Access::read,
                   {thread.warp->wgmma_agent, static_cast<uint32_t>(thread.warp->wgmma.executed + 1), operation.clock},
                   Proxy::asynchronous, {"wgmma", operation.at});
    return memory;
  };
  const auto value = [&](const unsigned char* memory) {
    uint32_t element = 0;
    std::memcpy(&element, memory, static_cast<size_t>(bytes));
    return element_value(type, element);
  };
  if (mn_major) {
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < count; i += per_chunk) {
        const unsigned char* chunk = read(first + i, k);
        for (int e = 0; e < per_chunk; ++e) out[k * count + i + e] = value(chunk + e * bytes);
      }
  } else {
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < depth; k += per_chunk) {
        const unsigned char* chunk = read(first + i, k);
        for (int e = 0; e < per_chunk; ++e) out[(k + e) * count + i] = value(chunk + e * bytes);
      }
  }
}

/// The operand B that a warpgroup shares is converted once, not once per warp, as long as nothing changes it.
struct OperandCache {
  const Block* block = nullptr;
  uint64_t version = 0, sequence = 0, descriptor = 0;
  unsigned warpgroup = 0;
  std::vector<float> values;
};
thread_local OperandCache cached_b;

const float* operand_b(const WgmmaOperation& operation, uint64_t sequence) {
  const Warp& warp = *self().warp;
  const Block& block = *warp.block;
  OperandCache& cache = cached_b;
  const bool fresh = cache.block == &block && cache.version == block.shared_version && cache.sequence == sequence &&
                     cache.descriptor == operation.b && cache.warpgroup == warp.index / 4;
  if (!fresh || options().check_races) {
    cache.values.resize(256 * 16);
    load_operand(operation, operation.b, operation.shape.mn_major_b, 0, operation.shape.n, cache.values.data());
    cache.block = &block;
    cache.version = block.shared_version;
    cache.sequence = sequence;
    cache.descriptor = operation.b;
    cache.warpgroup = warp.index / 4;
  }
  return cache.values.data();
}

// ---------------------------------------------------------------- execution

/// values[16][n] += a[depth][16] * b[depth][n], in the order of k.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && defined(__gnu_linux__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
void multiply(float* values, const float* a, const float* b, int n, int depth) {
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k) {
      const float factor = a[k * 16 + row];
      for (int i = 0; i < n; ++i) values[row * n + i] += factor * b[k * n + i];
    }
}

void execute(WgmmaOperation& operation, uint64_t sequence) {
  const WgmmaShape& shape = operation.shape;
  const int depth = k_extent(shape.type);
  float a[16 * 16];
  if (shape.a_in_registers) {
    for (int k = 0; k < depth; ++k)
      for (int row = 0; row < 16; ++row) a[k * 16 + row] = fragment_a_value(shape.type, operation.fragment_a, row, k);
  } else {
    load_operand(operation, operation.a, shape.mn_major_a, static_cast<int>(16 * (self().warp->index % 4)), 16, a);
  }
  const float* b = operand_b(operation, sequence);
  Accumulator& accumulator = *operation.accumulator;
  if (!operation.scale_d) std::fill(accumulator.values.begin(), accumulator.values.end(), 0.0f);
  multiply(accumulator.values.data(), a, b, shape.n, depth);
  operation.executed = true;
  --accumulator.users;
  ++worker->wgmma_warps;
}

/// Runs what the calling warp has queued before number `end`.
void run_queue(uint64_t end) {
  Warp& warp = *self().warp;
  WgmmaQueue& queue = warp.wgmma;
  for (uint64_t i = std::max(queue.executed, queue.base); i < end; ++i) {
    WgmmaOperation& operation = queue.operations[i - queue.base];
    if (operation.lanes != 32)
      fail(operation.at, "wgmma or its commit was reached by %u of 32 lanes of the warp", operation.lanes);
    if (!operation.commit) execute(operation, i);
    queue.executed = i + 1;
  }
}

// ---------------------------------------------------------------- issue

WgmmaOperation& append(bool commit, Location at) {
  Thread& thread = self();
  WgmmaQueue& queue = thread.warp->wgmma;
  const size_t number = thread.extras().wgmma_sequence++ - queue.base;
  if (number == queue.operations.size()) {
    WgmmaOperation& fresh = queue.operations.emplace_back();
    fresh.commit = commit;
    fresh.at = at;
  }
  WgmmaOperation& operation = queue.operations[number];
  if (operation.commit != commit) fail(at, "the lanes of a warp disagree about wgmma and its commit");
  ++operation.lanes;
  return operation;
}

/// The accumulator in flight whose registers these are, or one that is free.
Accumulator& find_accumulator(Warp& warp, const Thread& thread, float* d, int n, Location at) {
  Accumulator* spare = nullptr;
  int in_flight = n / 2;
  for (auto& candidate : warp.wgmma.accumulators) {
    if (!candidate->live) spare = candidate.get();
    else if (candidate->registers[thread.lane] == d && candidate->n == n) return *candidate;
    else in_flight += candidate->n / 2;
  }
  if (in_flight > static_cast<int>(warp.registers))
    fail(at, "wgmma accumulators of %d registers a thread, and the warp has %u", in_flight, warp.registers);
  if (!spare) spare = warp.wgmma.accumulators.emplace_back(std::make_unique<Accumulator>()).get();
  spare->n = n;
  spare->live = true;
  spare->users = 0;
  spare->values.assign(static_cast<size_t>(16 * n), 0.0f);
  std::fill(std::begin(spare->registers), std::end(spare->registers), nullptr);
  return *spare;
}

}  // namespace

void wgmma_fence() { self().extras().wgmma_fenced = true; }

void wgmma(const WgmmaShape& shape, float* d, uint64_t a, const uint32_t* fragment_a, uint64_t b, bool scale_d,
           Location at) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  if (!thread.extras().wgmma_fenced)
    fail(at, "wgmma without a wgmma_fence since its accumulators could last be touched");
  WgmmaOperation& operation = append(false, at);
  if (operation.lanes == 1) {
    operation.shape = shape;
    operation.a = a;
    operation.b = b;
    operation.scale_d = scale_d;
    operation.accumulator = &find_accumulator(warp, thread, d, shape.n, at);
    ++operation.accumulator->users;
    if (options().check_races) operation.clock = thread.clocks().now;
  } else if (operation.a != a || operation.b != b || operation.shape.n != shape.n || operation.scale_d != scale_d) {
    fail(at, "the lanes of a warp gave wgmma different descriptors");
  }
  if (fragment_a) std::memcpy(operation.fragment_a[thread.lane], fragment_a, sizeof operation.fragment_a[0]);
  if (options().check_races && operation.lanes > 1) join(operation.clock, thread.clocks().now);
  float*& registers = operation.accumulator->registers[thread.lane];
  if (!registers) {
    registers = d;
    save_fragment(*operation.accumulator, static_cast<int>(thread.lane));
  } else if (registers != d) {
    fail(at, "the lanes of a warp gave wgmma different accumulators");
  }
}

void wgmma_commit_group(Location at) {
  const WgmmaOperation& operation = append(true, at);
  if (operation.lanes != 32) return;
  const Timing timing = options().timing;
  if (timing == Timing::eager || (timing == Timing::random && worker->batch.random() % 2))
    run_queue(self().extras().wgmma_sequence);
}

namespace {

struct WgmmaWait {
  unsigned pending;
};

/// The number up to which operations must have run so that at most `pending` groups have not.
uint64_t end_of_wait(const WgmmaQueue& queue, unsigned pending) {
  size_t commits = 0;
  for (const WgmmaOperation& operation : queue.operations) commits += operation.commit;
  uint64_t end = queue.base;
  size_t seen = 0;
  for (size_t i = 0; i < queue.operations.size() && seen + pending < commits; ++i)
    if (queue.operations[i].commit) {
      ++seen;
      end = queue.base + i + 1;
    }
  return end;
}

void give_back(Accumulator& accumulator, const Warp& warp, Location at) {
  for (int lane = 0; lane < 32; ++lane) restore_fragment(accumulator, lane, at);
  accumulator.live = false;
  for (auto& thread : worker->batch.threads)
    if (thread->warp == &warp) thread->extras().wgmma_fenced = false;
}

void combine_wait(void* const (&operands)[32], Location at) {
  Warp& warp = *self().warp;
  WgmmaQueue& queue = warp.wgmma;
  const uint64_t end = end_of_wait(queue, static_cast<const WgmmaWait*>(operands[self().lane])->pending);
  run_queue(end);
  while (queue.base < end) {
    queue.operations.pop_front();
    ++queue.base;
  }
  for (auto& accumulator : queue.accumulators) {
    const bool in_use = std::any_of(queue.operations.begin(), queue.operations.end(),
                                    [&](const auto& operation) { return operation.accumulator == accumulator.get(); });
    if (accumulator->live && !in_use) give_back(*accumulator, warp, at);
  }
}

}  // namespace

void wgmma_wait_group(unsigned pending, Location at) {
  if (active_mask() != ~0u) fail(at, "wgmma by a warp of which lanes %08x are there, expected all 32", active_mask());
  WgmmaWait mine{pending};
  warp_collective("wgmma_wait_group", ~0u, &mine, combine_wait, at);
  if (!options().check_races) return;
  Thread& thread = self();
  uint32_t& seen = thread.clocks().now[thread.warp->wgmma_agent];
  seen = std::max(seen, static_cast<uint32_t>(thread.warp->wgmma.base));
}

}  // namespace fastconv::emulator
