// Errors and the deadlock report.
#include <cstdarg>
#include <cstring>
#include <map>
#include <stdexcept>

#include "emulator/state.h"

namespace fastconv::emulator {

std::string describe(Location at) {
  if (at.line() == 0) return "?";
  const char* slash = std::strrchr(at.file_name(), '/');
  return std::string(slash ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}

static std::string describe_block(const dim3& id) {
  std::string text = std::to_string(id.x);
  if (id.y || id.z) text += "," + std::to_string(id.y);
  if (id.z) text += "," + std::to_string(id.z);
  return "block " + text;
}

std::string describe(const Thread& thread) {
  return describe_block(thread.home->id) + " thread " + std::to_string(thread.index);
}

void fail(Location at, const char* format, ...) {
  char text[800];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const std::string message = describe(at) + ": " + text;
  if (!worker || !current) throw std::runtime_error(message);  // the scheduler's own stack: an operation that completes
  Thread& thread = self();
  worker->batch.error = message + " [" + describe(thread) + ", warp " + std::to_string(thread.warp->index) + "]";
  abandon_fiber();
}

static std::string describe_wait(const Batch& batch, const Thread& thread) {
  std::string text = thread.wait_what;
  if (std::strcmp(thread.wait_what, "mbarrier") == 0) {
    const Block* block = thread.home;
    if (const uint32_t rank = thread.wait_argument >> 24)
      for (const auto& candidate : batch.blocks)
        if (candidate->cluster == block->cluster && candidate->rank + 1 == rank) block = candidate.get();
    const uint32_t address = thread.wait_argument & 0xffffff;
    const Mbarrier& barrier = block->mbarriers[block->mbarrier_at[(address - kSharedWindow) / 8]];
    text += " " + std::to_string(address) + " for parity " + std::to_string(thread.wait_value) + " (it is in phase " +
            std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
            std::to_string(barrier.count) + " arrivals missing, " + std::to_string(barrier.bytes) +
            " bytes outstanding)";
  } else if (thread.wait_argument == ~0u) {
    text += " of the whole warp";
  } else if (thread.wait_argument) {
    text += " " + std::to_string(thread.wait_argument);
  }
  return text + " at " + describe(thread.wait_at);
}

std::string deadlock_report(const Batch& batch) {
  // What is waited for -> which warp -> how many of its threads.
  std::map<std::string, std::map<std::pair<unsigned, unsigned>, int>> waits;
  for (const auto& thread : batch.threads)
    if (!thread->done) ++waits[describe_wait(batch, *thread)][{thread->home->number, thread->warp->index}];
  std::string text = "deadlock: nothing can run\n";
  for (const auto& [wait, warps] : waits) {
    text += "  " + wait + "\n   ";
    int listed = 0;
    for (const auto& [where, threads] : warps) {
      if (++listed > 12) {
        text += " and " + std::to_string(warps.size() - 12) + " more,";
        break;
      }
      text += " block " + std::to_string(where.first) + " warp " + std::to_string(where.second);
      text += threads < 32 ? " (" + std::to_string(threads) + " threads)," : ",";
    }
    text.back() = '\n';
  }
  return text;
}

}  // namespace fastconv::emulator
