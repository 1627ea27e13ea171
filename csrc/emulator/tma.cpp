// TMA loads and stores, bulk groups. Facts 1 to 12 of the Hopper notes (README.md) are the specification.
//
// A load happens, in lazy timing, when nothing else can run; its destination holds NaN from issue to completion. A
// store happens at the wait for it.
#include "emulator/tma.h"

#include <algorithm>
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

TensorMap read_map(const CUtensorMap* encoded, int rank, bool im2col, uint32_t shared, Location at) {
  TensorMap map;
  std::memcpy(static_cast<void*>(&map), encoded, sizeof map);
  if (map.magic != kTensorMapMagic) fail(at, "TMA with a tensor map that was not encoded");
  if (map.rank != rank || map.im2col != im2col)
    fail(at, "TMA: the map has %d dimensions and is %s, the instruction wants %d and %s", map.rank,
         map.im2col ? "im2col" : "tiled", rank, im2col ? "im2col" : "tiled");
  if (map.swizzle != Swizzle::none && map.row_bytes() != swizzle_row_bytes(map.swizzle))
    fail(at, "TMA: box rows of %u bytes with a swizzle of %u: not modelled, what hardware does is not known",
         map.row_bytes(), swizzle_row_bytes(map.swizzle));
  require_aligned(shared, 128, "TMA", at);
  return map;
}

/// The part of a box row that lies in the tensor, and where.
struct BoxRow {
  unsigned char* global;  // null: all of it is outside
  uint32_t skip_bytes, bytes;
};

/// Calls body(row number, BoxRow) for every row of the box, in the order in which they lie in shared memory.
template <class Body>
void for_rows(const TmaOperation& operation, const Body& body) {
  const TensorMap& map = operation.map;
  const int* start = operation.coordinates.at;
  const int64_t elements = map.row_bytes() / map.element_bytes;
  const int64_t first = std::max<int64_t>(0, -start[0]);
  const int64_t last = std::min<int64_t>(elements, int64_t{map.extent[0]} - start[0]);
  int64_t w = start[1], h = start[2], n = start[3];
  for (uint32_t row = 0; row < map.rows(); ++row) {
    int64_t position[5] = {};
    if (map.im2col) {
      position[1] = w + operation.coordinates.offset_w;
      position[2] = h + operation.coordinates.offset_h;
      position[3] = n;
      if ((w += map.step[0]) > int64_t{map.extent[1]} - 1 + map.upper[0]) {
        w = map.lower[0];
        if ((h += map.step[1]) > int64_t{map.extent[2]} - 1 + map.upper[1]) {
          h = map.lower[1];
          ++n;
        }
      }
    } else {
      uint32_t rest = row;
      for (int axis = 1; axis < map.rank; rest /= map.box[axis], ++axis)
        position[axis] = start[axis] + rest % map.box[axis];
    }
    bool inside = first < last;
    uint64_t address = map.base + static_cast<uint64_t>(start[0] + first) * map.element_bytes;
    for (int axis = 1; axis < map.rank; ++axis) {
      inside = inside && position[axis] >= 0 && position[axis] < map.extent[axis];
      address += static_cast<uint64_t>(position[axis]) * map.stride_bytes[axis - 1];
    }
    body(row, BoxRow{inside ? reinterpret_cast<unsigned char*>(address) : nullptr,
                     static_cast<uint32_t>(first * map.element_bytes),
                     inside ? static_cast<uint32_t>((last - first) * map.element_bytes) : 0});
  }
}

/// Measured: to nearest, ties to even; the one subnormal that was tried became zero.
void round_to_tf32(unsigned char* row, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) {
    uint32_t bits;
    std::memcpy(&bits, row + i, 4);
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    else if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
    std::memcpy(row + i, &bits, 4);
  }
}

/// Copies a row between its plain form and shared memory, 16 bytes at a time, through the swizzle.
template <bool kToShared>
void move_row(unsigned char* shared, const TensorMap& map, uint32_t address, unsigned char* row) {
  for (uint32_t b = 0; b < map.row_bytes(); b += 16) {
    unsigned char* there = shared + swizzle_address(address + b, map.swizzle) - kSharedWindow;
    if (kToShared) std::memcpy(there, row + b, 16);
    else std::memcpy(row + b, there, 16);
  }
}

void execute_load(TmaOperation& operation) {
  const TensorMap& map = operation.map;
  for_rows(operation, [&](uint32_t number, const BoxRow& part) {
    unsigned char row[1024] = {};
    if (part.global) std::memcpy(row + part.skip_bytes, part.global, part.bytes);
    if (map.rounds_to_tf32) round_to_tf32(row, map.row_bytes());
    for (Block* block : operation.destinations)
      move_row<true>(block->shared, map, operation.shared + number * map.row_bytes(), row);
  });
  for (Block* block : operation.destinations) {
    ++block->shared_version;
    Mbarrier& barrier =
        block->mbarriers[static_cast<size_t>(block->mbarrier_at[(operation.barrier - kSharedWindow) / 8])];
    barrier.bytes -= map.box_bytes();
    update(barrier);
  }
}

/// Reads the source, once and for all: what follows a wait with .read may overwrite it.
void stage(TmaOperation& operation) {
  if (!operation.staged.empty()) return;
  const TensorMap& map = operation.map;
  operation.staged.resize(map.box_bytes());
  for (uint32_t number = 0; number < map.rows(); ++number)
    move_row<false>(operation.source->shared, map, operation.shared + number * map.row_bytes(),
                    operation.staged.data() + number * map.row_bytes());
}

void issue(TmaOperation&& operation) {
  ++worker->tma_operations;
  if (options().timing == Timing::eager) execute(operation);
  else worker->batch.pending.push_back(std::move(operation));
}

void check_start(const TensorMap& map, const TmaCoordinates& coordinates, Location at) {
  for (int i = 0; i < 2; ++i) {
    const int lower = map.lower[i], upper = static_cast<int>(map.extent[1 + i]) - 1 + map.upper[i];
    const int base = coordinates.at[1 + i], offset = i ? coordinates.offset_h : coordinates.offset_w;
    if (base < lower || base > upper)
      fail(at, "TMA im2col: base %c = %d is outside the box from %d to %d (error 715 on hardware)", "wh"[i], base,
           lower, upper);
    if ((base - lower) % map.step[i])
      fail(at, "TMA im2col: base %c = %d is off the lattice of step %d from %d", "wh"[i], base, map.step[i], lower);
    if (offset < 0 || offset > 255) fail(at, "TMA im2col: offset %d, expected 0 to 255", offset);
  }
}

}  // namespace

void execute(TmaOperation& operation) {
  if (!operation.store) return execute_load(operation);
  stage(operation);
  for_rows(operation, [&](uint32_t number, const BoxRow& part) {
    if (part.global)
      std::memcpy(part.global, operation.staged.data() + number * operation.map.row_bytes() + part.skip_bytes,
                  part.bytes);
  });
}

void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, unsigned blocks, int rank, bool im2col,
              TmaCoordinates coordinates, Location at) {
  Thread& thread = self();
  TmaOperation operation;
  operation.map = read_map(map, rank, im2col, destination, at);
  operation.coordinates = coordinates;
  operation.shared = destination & 0xffffff;
  operation.barrier = barrier & 0xffffff;
  operation.issuer = &thread;
  operation.at = at;
  if (im2col) check_start(operation.map, coordinates, at);
  if (blocks == 0) operation.destinations.push_back(thread.home);
  for (auto& block : worker->batch.blocks)
    if (block->cluster == thread.home->cluster && blocks >> block->rank & 1)
      operation.destinations.push_back(block.get());
  const uint32_t bytes = operation.map.box_bytes();
  for (Block* block : operation.destinations) {
    const uint32_t rank_bits = (block->rank + 1) << 24;
    unsigned char* memory = resolve(operation.shared | rank_bits, bytes, "a TMA load", at);
    const Mbarrier& target = find_mbarrier(operation.barrier | rank_bits, at);
    if (!target.fenced)
      fail(at, "a TMA load onto mbarrier %u without a fence_mbarrier_init after its initialisation", target.address);
    for (uint32_t i = 0; i < bytes; i += 4) std::memcpy(memory + i, &kPoison, 4);
    ++block->shared_version;
    if (!options().check_races) continue;
    const Actor load{target.agent, target.phase + 1, thread.clocks().now};
    check_shared(*block, operation.shared, bytes, Access::write, load, Proxy::generic, {"a TMA load", at});
    for_rows(operation, [&](uint32_t, const BoxRow& part) {
      if (part.global) check_global(part.global, part.bytes, Access::read, load, {"a TMA load", at});
    });
  }
  issue(std::move(operation));
}

void tma_store(const CUtensorMap* map, uint32_t source, int rank, bool im2col, TmaCoordinates coordinates,
               Location at) {
  Thread& thread = self();
  TmaOperation operation;
  operation.map = read_map(map, rank, im2col, source, at);
  if (im2col) check_start(operation.map, coordinates, at);
  operation.store = true;
  operation.coordinates = coordinates;
  operation.shared = source;
  operation.source = thread.home;
  operation.issuer = &thread;
  operation.group = thread.extras().bulk_group;
  operation.at = at;
  resolve(source, operation.map.box_bytes(), "a TMA store", at);
  if (options().check_races) {
    const Actor store{thread.warp->bulk_agent, operation.group + 1, thread.clocks().now};
    check_shared(*thread.home, source, operation.map.box_bytes(), Access::read, store, Proxy::asynchronous,
                 {"a TMA store", at});
    for_rows(operation, [&](uint32_t, const BoxRow& part) {
      if (part.global) check_global(part.global, part.bytes, Access::write, store, {"a TMA store", at});
    });
  }
  issue(std::move(operation));
}

void bulk_commit_group() { ++self().extras().bulk_group; }

void bulk_wait_group(unsigned pending, bool read_only) {
  Thread& thread = self();
  ThreadExtras& extras = thread.extras();
  const unsigned done = extras.bulk_group > pending ? extras.bulk_group - pending : 0;
  extras.bulk_done = std::max(extras.bulk_done, done);
  auto& queue = worker->batch.pending;
  for (size_t i = 0; i < queue.size();) {
    TmaOperation& operation = queue[i];
    const bool covered = operation.store && operation.issuer == &thread && operation.group < extras.bulk_done;
    if (!covered || read_only) {
      if (covered) stage(operation);
      ++i;
      continue;
    }
    TmaOperation finished = std::move(operation);
    queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(i));
    execute(finished);
  }
  if (!options().check_races) return;
  uint32_t& seen = thread.clocks().now[thread.warp->bulk_agent];
  seen = std::max(seen, extras.bulk_done);
}

void fence_proxy_async() {
  if (!options().check_races) return;
  Thread& thread = self();
  thread.clocks().proxy_fence = thread.clocks().now[thread.agent];
  tick(thread);
}

}  // namespace fastconv::emulator
