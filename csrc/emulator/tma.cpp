#include "emulator/state.h"
namespace fastconv::emulator {
void execute(TmaOperation&) {}
}  // namespace fastconv::emulator
