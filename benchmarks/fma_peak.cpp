// Independent chains of fused multiply-adds in registers: what the arithmetic of one core can do at most.
// Compiled by benchmarks/fma_peak.py for the machine that measures.

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
double run(std::int64_t steps) {
  typedef T Vector __attribute__((vector_size(kBytes)));
  constexpr int kLanes = kBytes / sizeof(T);
  constexpr int kChains = 12;  // 4 cycles of latency on 2 ports ask for 8; 12 and the factors fit in 16 registers
  Vector sums[kChains], factor, addend;
  for (int lane = 0; lane < kLanes; ++lane) {
    factor[lane] = T(0.5);
    addend[lane] = T(1);
    for (Vector& sum : sums) sum[lane] = T(lane);
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    asm volatile("" : "+g"(step));  // no step may be computed together with the next
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * factor + addend;
  }
  Vector total = sums[0];
  for (int chain = 1; chain < kChains; ++chain) total += sums[chain];
  double result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  return result;
}

}  // namespace

extern "C" double fma_float32(std::int64_t steps) { return run<float>(steps); }
extern "C" double fma_float64(std::int64_t steps) { return run<double>(steps); }
extern "C" int fma_flops_per_step(int element_bytes) { return 12 * (kBytes / element_bytes) * 2; }
