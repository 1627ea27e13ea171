// Picks the kernel table of the active instruction set. FASTCONV_KERNEL_TABLE(conv2d_kernels) defines conv2d_kernels(),
// which returns conv2d_kernels_<isa>(). What avx512_bf16 has beyond avx512 is not in these tables.
#pragma once

#include <stdexcept>

#include "common/isa.h"

#if defined(__x86_64__)
#define FASTCONV_ISA_CASES(family)   \
  case ::fastconv::Isa::avx512_bf16: \
  case ::fastconv::Isa::avx512:      \
    return family##_avx512();        \
  case ::fastconv::Isa::avx2:        \
    return family##_avx2();
#elif defined(__aarch64__)
#define FASTCONV_ISA_CASES(family) \
  case ::fastconv::Isa::neon:      \
    return family##_neon();
#else
#define FASTCONV_ISA_CASES(family)
#endif

#define FASTCONV_KERNEL_TABLE(family)                                             \
  inline auto family() {                                                          \
    switch (::fastconv::active_isa()) {                                           \
      FASTCONV_ISA_CASES(family)                                                  \
      case ::fastconv::Isa::generic:                                              \
        return family##_generic();                                                \
      default:                                                                    \
        throw std::logic_error("no kernels were built for this instruction set"); \
    }                                                                             \
  }
