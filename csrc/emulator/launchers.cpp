// The C entry points of a library of emulated kernels.
#include "emulator/launchers.h"

#include <cstring>
#include <exception>

#include "emulator/run.h"

namespace fastconv::emulator {
std::vector<Launcher>& launchers() {
  static std::vector<Launcher> list;
  return list;
}
}  // namespace fastconv::emulator

using namespace fastconv::emulator;

#define FASTCONV_EXPORT extern "C" __attribute__((visibility("default")))

FASTCONV_EXPORT int fastconv_emulator_launcher_count() { return static_cast<int>(launchers().size()); }
FASTCONV_EXPORT const char* fastconv_emulator_launcher_op(int i) { return launchers()[i].op.c_str(); }
FASTCONV_EXPORT const char* fastconv_emulator_launcher_algo(int i) { return launchers()[i].algo.c_str(); }
FASTCONV_EXPORT const char* fastconv_emulator_launcher_signature(int i) { return launchers()[i].signature.c_str(); }
FASTCONV_EXPORT int fastconv_emulator_launcher_returns_number(int i) { return launchers()[i].returns_number; }

/// 0 with the launcher's number in `result`, or 1 with the error's text in `error`.
FASTCONV_EXPORT int fastconv_emulator_call(int i, void* const* arguments, int64_t* result, char* error,
                                           size_t error_bytes) {
  try {
    *result = launchers()[i].call(launchers()[i].function, arguments);
    return 0;
  } catch (const std::exception& failure) {
    std::strncpy(error, failure.what(), error_bytes - 1);
    error[error_bytes - 1] = 0;
    return 1;
  }
}

FASTCONV_EXPORT void fastconv_emulator_configure(int timing, unsigned seed, int check_races, int os_threads,
                                                 int sm_count, int capability) {
  Options& chosen = options();
  chosen.timing = static_cast<Timing>(timing);
  chosen.seed = seed;
  chosen.check_races = check_races != 0;
  chosen.os_threads = os_threads;
  chosen.sm_count = sm_count;
  chosen.capability = capability;
}

/// Launches, fiber switches, TMA operations and warps' wgmma so far.
FASTCONV_EXPORT void fastconv_emulator_statistics(uint64_t* counts) {
  const Statistics& total = statistics();
  const uint64_t all[] = {total.launches, total.switches, total.tma_operations, total.wgmma_warps};
  std::memcpy(counts, all, sizeof all);
}
