// Which instruction set the kernels of this process use: the widest that the CPU has, or FASTCONV_CPU_ISA.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastconv {

/// avx512_bf16: avx512 and the dot product of pairs of bfloat16, which convolutions of that type use.
enum class Isa : int { generic, neon, avx2, avx512, avx512_bf16 };
inline constexpr Isa kIsas[] = {Isa::generic, Isa::neon, Isa::avx2, Isa::avx512, Isa::avx512_bf16};
inline constexpr const char* kIsaNames[] = {"generic", "neon", "avx2", "avx512", "avx512_bf16"};
inline const char* name_of(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

inline bool cpu_supports(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::neon:
#if defined(__aarch64__)
      return true;
#else
      return false;
#endif
    case Isa::avx2:
#if defined(__x86_64__)
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::avx512:
#if defined(__x86_64__)
      return cpu_supports(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
      return false;
#endif
    case Isa::avx512_bf16:
#if defined(__x86_64__)
      return cpu_supports(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
  throw std::logic_error("unknown instruction set");
}

inline Isa choose_isa() {
  const char* wanted = std::getenv("FASTCONV_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::neon})
      if (cpu_supports(isa)) return isa;
    return Isa::generic;
  }
  for (Isa isa : kIsas) {
    if (std::strcmp(wanted, name_of(isa)) != 0) continue;
    if (!cpu_supports(isa))
      throw std::runtime_error(std::string("FASTCONV_CPU_ISA is ") + wanted +
                               ", but this CPU does not have it; unset it to let fastconv choose");
    return isa;
  }
  throw std::runtime_error(std::string("FASTCONV_CPU_ISA is ") + wanted +
                           ", expected one of generic, neon, avx2, avx512, avx512_bf16");
}

/// Chosen once per process.
inline Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fastconv
