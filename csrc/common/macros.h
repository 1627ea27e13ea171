#pragma once

// Functions shared by translation units that are compiled for different instruction sets must never be emitted out of
// line: the linker keeps one copy of an inline function, and it may keep the AVX-512 one.
#define FASTCONV_INLINE inline __attribute__((always_inline))
