// Include first in a translation unit for AVX2 + FMA + F16C. Everything defined after it is compiled for that set;
// standard headers must come before, so that their inline functions stay portable.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define FASTCONV_SIMD_AVX2 1
#define FASTCONV_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
