// Sums over all blocks before this one, in one pass over the data: every block publishes its own count, and learns from
// the blocks before it where its own begin (decoupled look-back, Merrill and Garland 2016).
#pragma once

#include "launch.cuh"
#include "warp.cuh"

namespace spaceport {
namespace cuda {

// What the blocks tell each other: zero while nothing is known, then a count with a mark above it.
constexpr uint64_t kOwnCount = uint64_t(1) << 62;  // of the block alone
constexpr uint64_t kSumSoFar = uint64_t(2) << 62;  // of the block and all before it
constexpr uint64_t kCountBits = kOwnCount - 1;

constexpr int kLookBackRows = 256;  // of a block, one a thread
constexpr int kWindows = 4;         // of 32 blocks that one look takes in

// Zero at the start.
struct LookBack {
  uint64_t* counts;  // [n_blocks]
  unsigned* ticket;  // blocks take numbers in the order in which they start, so that nobody waits for one not running

  static LookBack of(Arena& arena, int64_t n_rows) {
    return {arena.take<uint64_t>(n_blocks_of(n_rows, kLookBackRows)), arena.take<unsigned>(1)};
  }
  static size_t n_bytes(int64_t n_rows) {
    Arena arena(nullptr);
    of(arena, n_rows);
    return arena.used();
  }
};

// Called by one whole warp: publishes the block's count and returns the sum of the counts of all blocks before it.
__device__ inline uint64_t sum_before(uint64_t* state, int64_t block, uint64_t own) {
  volatile uint64_t* shared_state = state;
  const int lane = int(threadIdx.x % 32);
  if (block == 0) {
    if (lane == 0) shared_state[0] = kSumSoFar | own;
    return 0;
  }
  if (lane == 0) shared_state[block] = kOwnCount | own;
  uint64_t sum = 0;
  bool is_done = false;
  for (int64_t last = block - 1; !is_done; last -= 32 * kWindows) {
    uint64_t words[kWindows];  // asked for at once: as many blocks may be running, and each question takes its time
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      const int64_t mine = last - 32 * w - lane;
      words[w] = kSumSoFar;  // before the first block there is nothing
      if (mine >= 0) words[w] = shared_state[mine];
    }
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (is_done) break;
      const int64_t mine = last - 32 * w - lane;
      while (words[w] == 0) words[w] = shared_state[mine];
      const unsigned ends = __ballot_sync(kAllLanes, (words[w] & kSumSoFar) != 0);
      const int n_used = ends == 0 ? 32 : __ffs(int(ends));  // up to the nearest block that knows its sum
      uint64_t part = lane < n_used ? words[w] & kCountBits : 0;
      for (int step = 16; step > 0; step /= 2) part += __shfl_xor_sync(kAllLanes, part, step);
      sum += part;
      is_done = ends != 0;
    }
  }
  if (lane == 0) shared_state[block] = kSumSoFar | (sum + own);
  return sum;
}

// Two sums at once: of the threads before this one, and of the block.
struct Count {
  unsigned splats;
  unsigned instances;
};
struct BlockSums {
  Count before, total;
};
template <int kThreads>
__device__ BlockSums block_sums(const Count& own) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Count of_warps[kWarps];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const Count sum = {warp_sum_so_far(own.splats), warp_sum_so_far(own.instances)};
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  BlockSums sums = {{sum.splats - own.splats, sum.instances - own.instances}, {0, 0}};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) {
      sums.before.splats += of_warps[w].splats;
      sums.before.instances += of_warps[w].instances;
    }
    sums.total.splats += of_warps[w].splats;
    sums.total.instances += of_warps[w].instances;
  }
  return sums;
}

}  // namespace cuda
}  // namespace spaceport
