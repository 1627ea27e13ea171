// Vector clocks and the shadow of memory.
#include "emulator/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <memory>
#include <unordered_map>

#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

// ---------------------------------------------------------------- sites: records keep a number

struct SameSite {
  bool operator()(const Site& a, const Site& b) const {
    return a.instruction == b.instruction && a.what == b.what && a.at.line() == b.at.line() &&
           a.at.file_name() == b.at.file_name();
  }
};

struct SiteHash {
  size_t operator()(const Site& site) const {
    const auto mix = [](uint64_t value) { return value * 0x9e3779b97f4a7c15u; };
    return mix(reinterpret_cast<uintptr_t>(site.instruction)) ^ mix(reinterpret_cast<uintptr_t>(site.what) + 1) ^
           mix(reinterpret_cast<uintptr_t>(site.at.file_name()) + site.at.line());
  }
};

std::vector<Site> sites;
std::unordered_map<Site, uint32_t, SiteHash, SameSite> site_numbers;

uint32_t number_of(const Site& site) {
  const auto [found, fresh] = site_numbers.try_emplace(site, static_cast<uint32_t>(sites.size()));
  if (fresh) sites.push_back(site);
  return found->second;
}

/// "file.cu:12" for an instruction, by binutils' addr2line where it is installed.
std::string line_of(const void* instruction) {
  Dl_info module;
  if (!dladdr(instruction, &module)) return "?";
  const auto offset = static_cast<const char*>(instruction) - static_cast<const char*>(module.dli_fbase);
  char command[1200], line[400] = "";
  snprintf(command, sizeof command, "addr2line -e '%s' %#zx 2>/dev/null", module.dli_fname,
           static_cast<size_t>(offset) - 1);  // the return address is one past the call
  if (FILE* output = popen(command, "r")) {
    if (!fgets(line, sizeof line, output)) line[0] = 0;
    pclose(output);
  }
  std::string text = line;
  text = text.substr(0, text.find_first_of(" \n"));
  if (text.empty() || text[0] == '?') return "offset " + std::to_string(offset) + " of " + module.dli_fname;
  return text.substr(text.rfind('/') + 1);
}

std::string describe_site(const Site& site) {
  return std::string(site.what) + " at " + (site.instruction ? line_of(site.instruction) : describe(site.at));
}

std::string agent_name(uint32_t agent) {
  const Batch& batch = worker->batch;
  if (agent < batch.threads.size()) return describe(*batch.threads[agent]);
  for (const auto& block : batch.blocks) {
    const std::string name = "block " + std::to_string(block->number);
    for (const auto& warp : block->warps) {
      if (agent == warp->wgmma_agent) return "wgmma of " + name + " warp " + std::to_string(warp->index);
      if (agent == warp->bulk_agent) return "bulk stores of " + name + " warp " + std::to_string(warp->index);
    }
    for (const Mbarrier& barrier : block->mbarriers)
      if (agent == barrier.agent) return "TMA onto mbarrier " + std::to_string(barrier.address) + " of " + name;
  }
  return "?";
}

// ---------------------------------------------------------------- cells

uint32_t current_batch = 0;

[[noreturn]] void report(const Site& site, const Actor& who, const ShadowRecord& other, const std::string& where) {
  const char* verb = other.access == Access::read ? "read" : other.access == Access::write ? "write" : "atomic";
  const std::string other_name =
      other.batch == current_batch ? agent_name(other.agent) : std::string("a block of another cluster");
  fail(site.at, "race on %s: %s by %s is not ordered after the %s by %s (%s)", where.c_str(),
       describe_site(site).c_str(), agent_name(who.agent).c_str(), verb, other_name.c_str(),
       describe_site(sites[other.site]).c_str());
}

bool ordered(const ShadowRecord& record, const Actor& who) {
  if (record.batch != current_batch) return false;
  return record.agent == who.agent || who.seen[record.agent] >= record.clock;
}

bool conflict(Access a, Access b) {
  if (a == Access::read && b == Access::read) return false;
  return !(a == Access::atomic && b == Access::atomic);
}

/// Readers of global memory are many (weights) and rarely matter: a cell keeps this many of them.
constexpr size_t kMostRecords = 40;

/// Drops what `fresh` makes superfluous: whatever conflicts with it later conflicts with `fresh` too.
void remember(ShadowCell& cell, const ShadowRecord& fresh, const Actor& who) {
  std::erase_if(cell.records, [&](ShadowRecord& old) {
    const bool replaced = ordered(old, who) && (fresh.access != Access::read || old.access == Access::read);
    if (replaced) old.bytes &= static_cast<uint8_t>(~fresh.bytes);
    return old.bytes == 0;
  });
  if (cell.records.size() >= kMostRecords)
    for (size_t i = 0; i < cell.records.size(); ++i)
      if (cell.records[i].access == Access::read) {
        cell.records.erase(cell.records.begin() + static_cast<std::ptrdiff_t>(i));
        break;
      }
  cell.records.push_back(fresh);
}

template <class Where>
void access_cell(ShadowCell& cell, ShadowRecord fresh, const Actor& who, Proxy proxy, const Site& site,
                 const Where& where) {
  for (const ShadowRecord& old : cell.records) {
    if (!(old.bytes & fresh.bytes)) continue;
    if (conflict(old.access, fresh.access) && !ordered(old, who)) report(site, who, old, where());
    const Batch& batch = worker->batch;
    if (proxy == Proxy::asynchronous && old.access == Access::write && old.agent < batch.threads.size() &&
        batch.threads[old.agent]->clocks().proxy_fence < old.clock)
      fail(site.at, "%s reads %s, written by %s (%s), which has not executed fence_proxy_async since", site.what,
           where().c_str(), agent_name(old.agent).c_str(), describe_site(sites[old.site]).c_str());
  }
  remember(cell, fresh, who);
}

/// Calls body(address / 4, mask) for each group of four bytes that [address, address + bytes) touches.
template <class Body>
void for_cells(uintptr_t address, size_t bytes, const Body& body) {
  const uintptr_t end = address + bytes;
  for (uintptr_t cell = address / 4; cell * 4 < end; ++cell) {
    uint8_t mask = 0;
    for (unsigned byte = 0; byte < 4; ++byte)
      if (cell * 4 + byte >= address && cell * 4 + byte < end) mask |= static_cast<uint8_t>(1u << byte);
    body(cell, mask);
  }
}

struct GlobalPage {
  std::array<ShadowCell, 1024> cells;
};
std::unordered_map<uintptr_t, std::unique_ptr<GlobalPage>> global_pages;

// ---------------------------------------------------------------- atomics

std::unordered_map<const void*, Clock> atomic_clocks;

}  // namespace

Actor actor(Thread& thread) { return {thread.agent, thread.clocks().now[thread.agent], thread.clocks().now}; }

void tick(Thread& thread) { ++thread.clocks().now[thread.agent]; }

void check_shared(Block& block, uint32_t address, uint32_t bytes, Access access, const Actor& who, Proxy proxy,
                  const Site& site) {
  const uint32_t offset = (address & 0xffffff) - kSharedWindow;
  const ShadowRecord record{who.agent, who.clock, number_of(site), current_batch, 0, access};
  for_cells(offset, bytes, [&](uintptr_t cell, uint8_t mask) {
    ShadowRecord fresh = record;
    fresh.bytes = mask;
    access_cell(block.cells[cell], fresh, who, proxy, site,
                [&] { return "shared address " + std::to_string(kSharedWindow + 4 * cell); });
  });
}

void check_shared(uint32_t address, uint32_t bytes, Access access, const char* what, Location at) {
  if (!options().check_races) return;
  Block* owner = nullptr;
  resolve(address, bytes, what, at, &owner);
  check_shared(*owner, address, bytes, access, actor(self()), Proxy::generic, {what, at});
}

void check_global(const void* pointer, size_t bytes, Access access, const Actor& who, const Site& site) {
  const ShadowRecord record{who.agent, who.clock, number_of(site), current_batch, 0, access};
  for_cells(reinterpret_cast<uintptr_t>(pointer), bytes, [&](uintptr_t cell, uint8_t mask) {
    auto& page = global_pages[cell / 1024];
    if (!page) page = std::make_unique<GlobalPage>();
    ShadowRecord fresh = record;
    fresh.bytes = mask;
    access_cell(page->cells[cell % 1024], fresh, who, Proxy::generic, site, [&] {
      char text[40];
      snprintf(text, sizeof text, "global address %#zx", static_cast<size_t>(4 * cell));
      return std::string(text);
    });
  });
}

void forget_global() {
  global_pages.clear();
  atomic_clocks.clear();
}

void begin_race_batch() {
  ++current_batch;
  atomic_clocks.clear();
}

void thread_fence() {
  if (!options().check_races) return;
  Thread& thread = self();
  join(thread.clocks().now, thread.clocks().pending);
  thread.clocks().at_fence = thread.clocks().now;
  tick(thread);
}

void synchronise_atomic(const void* pointer) {
  Thread& thread = self();
  Clock& flag = atomic_clocks[pointer];
  flag.resize(worker->batch.agents);
  thread.clocks().pending.resize(worker->batch.agents);
  join(thread.clocks().pending, flag);
  join(flag, thread.clocks().at_fence);
}

}  // namespace fastconv::emulator
