// multiply_adds: what a GPU can issue at best, for benchmarks to compare with.
#include "diagnose.h"
#include "launch.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void multiply_adds_kernel(float* sink) {
  constexpr int kChains = 8;  // independent, to hide the latency
  constexpr int kRounds = int(kMultiplyAddFlops / (kThreads * kChains * 2));
  float chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = float(threadIdx.x + i);
#pragma unroll 16
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kChains; ++i) chains[i] = fmaf(chains[i], 0.999f, 0.001f);
  }
  float total = 0.0f;
  for (int i = 0; i < kChains; ++i) total += chains[i];
  if (total < 0.0f) *sink = total;  // never: so that the work is not removed
}

}  // namespace
}  // namespace cuda

void multiply_adds(const Cuda& backend, int64_t n_pieces) {
  cuda::multiply_adds_kernel<<<unsigned(n_pieces), cuda::kThreads, 0, stream_of(backend)>>>(nullptr);
  check_launch("multiply_adds");
}

}  // namespace spaceport
