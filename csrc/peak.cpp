// multiply_adds: what an instruction set can do at best, for benchmarks to compare with.
#include "kernels.h"
#include "simd.h"

namespace spaceport::SPACEPORT_ISA {

void multiply_adds(const Cpu& cpu, int64_t n_pieces) {
  constexpr int kChains = 10;  // independent, to hide the latency
  constexpr int64_t kRounds = kMultiplyAddFlops / (kChains * 8 * 2);
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    Float8 chains[kChains];
    for (int i = 0; i < kChains; ++i) chains[i] = Float8(float(piece + i));
    const Float8 factor(0.999f), term(0.001f);
    for (int64_t round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kChains; ++i) {
        chains[i] = multiply_add(chains[i], factor, term);
      }
    }
    Float8 total(0.0f);
    for (const Float8& chain : chains) total = total + chain;
    volatile float sink = sum(total);  // so that the work is not removed
    (void)sink;
  });
}

}  // namespace spaceport::SPACEPORT_ISA
