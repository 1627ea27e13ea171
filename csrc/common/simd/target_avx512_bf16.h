// Include first in a translation unit for AVX-512 with AVX512-BF16. See target_avx2.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define FASTCONV_SIMD_AVX512 1
#define FASTCONV_SIMD_AVX512_BF16 1
#define FASTCONV_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
// gcc 12 takes the deliberately undefined operands inside its own avx512fintrin.h for mistakes of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
