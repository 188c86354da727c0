// A stable radix sort of keys and what belongs to them, one sweep over both a digit, least significant first (Adinets
// and Merrill, 2022). How many there are may be known on the device alone, and the largest keys may be left out: a
// library's sort takes its number from the host, and would sort all that there is room for.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "warp.cuh"

namespace spaceport {
namespace cuda {

constexpr int kMostDigitBits = 8, kDigits = 1 << kMostDigitBits;
constexpr int kSortThreads = kDigits, kSortWarps = kSortThreads / 32;  // a thread a digit
constexpr int kMostSortPasses = 4;
constexpr int kSortItems = 8;  // keys of a thread: few, so that many blocks run at once
constexpr int kSortTile = kSortThreads * kSortItems;

// At most `most`; *n, where that is given.
struct SortSize {
  int64_t most;
  const int64_t* n = nullptr;

  __device__ int64_t get() const { return n != nullptr && *n < most ? *n : most; }
};

template <class Key>
__device__ unsigned digit_of(Key key, int shift, int n_bits) {
  return unsigned(key >> shift) & ((1u << n_bits) - 1u);
}

// Digits of equal length: one of few, which kernels are compiled for.
struct Digits {
  int n_passes, n_bits;

  static constexpr Digits of(int n_key_bits) {
    const int n_passes = (n_key_bits + kMostDigitBits - 1) / kMostDigitBits;
    return {n_passes, n_key_bits <= n_passes * (kMostDigitBits - 1) ? kMostDigitBits - 1 : kMostDigitBits};
  }
};

// What the blocks of a sort tell each other; zero before it. Its memory lies in one piece.
struct SortState {
  Digits digits;
  int64_t most;
  uint32_t* totals;   // [n_passes, kDigits] keys with each digit
  uint32_t* counts;   // [n_passes, n_blocks, kDigits] of a block alone, or of it and all before it: the mark says which
  unsigned* tickets;  // [n_passes] blocks take numbers in the order in which they start

  static SortState of(Arena& arena, int64_t most, int n_key_bits) {
    SortState s = {Digits::of(n_key_bits), most, nullptr, nullptr, nullptr};
    s.totals = arena.take<uint32_t>(int64_t(s.digits.n_passes) * kDigits);
    s.counts = arena.take<uint32_t>(int64_t(s.digits.n_passes) * s.n_blocks() * kDigits);
    s.tickets = arena.take<unsigned>(s.digits.n_passes);
    return s;
  }
  int64_t n_blocks() const { return n_blocks_of(most, kSortTile); }
};

template <class Key>
struct SortPair {
  Key* keys;
  int32_t* values;
};

template <class Key>
struct SortPass {
  SortPair<const Key> from;  // values null: 0, 1, 2, ...
  SortPair<Key> to;          // keys null: not wanted
  SortSize size;
  uint32_t mask, last;  // what has a larger key below the mask is left out
  int shift;
  const uint32_t* totals;
  uint32_t* counts;
  unsigned* ticket;
};

// How many keys have each value of each digit. Copies keep lanes apart that count the same.
template <class Key>
__global__ __launch_bounds__(kSortThreads) void count_digits_kernel(const Key* keys, SortSize size, Digits digits,
                                                                    uint32_t mask, uint32_t last, uint32_t* totals) {
  constexpr int kCopies = 8, kKeys = 16 / int(sizeof(Key));
  __shared__ uint32_t counts[kMostSortPasses][kDigits][kCopies];
  for (int i = int(threadIdx.x); i < digits.n_passes * kDigits * kCopies; i += kSortThreads) (&counts[0][0][0])[i] = 0;
  __syncthreads();
  const auto count = [&](Key key) {
    if ((uint32_t(key) & mask) > last) return;
    for (int pass = 0; pass < digits.n_passes; ++pass) {
      const unsigned digit = digit_of(key, pass * digits.n_bits, digits.n_bits);
      atomicAdd(&counts[pass][digit][threadIdx.x % kCopies], 1u);
    }
  };
  const int64_t n = size.get(), n_whole = n / kKeys, thread = int64_t(blockIdx.x) * kSortThreads + threadIdx.x;
  for (int64_t i = thread; i < n_whole; i += int64_t(gridDim.x) * kSortThreads) {
    Key some[kKeys];
    *reinterpret_cast<uint4*>(some) = reinterpret_cast<const uint4*>(keys)[i];
#pragma unroll
    for (int j = 0; j < kKeys; ++j) count(some[j]);
  }
  if (n_whole * kKeys + thread < n) count(keys[n_whole * kKeys + thread]);
  __syncthreads();
  for (int pass = 0; pass < digits.n_passes; ++pass) {
    uint32_t sum = 0;
    for (int copy = 0; copy < kCopies; ++copy) sum += counts[pass][threadIdx.x][copy];
    if (sum != 0) atomicAdd(totals + pass * kDigits + threadIdx.x, sum);
  }
}

// Sum over the threads before this one, of a block of kSortThreads.
__device__ inline uint64_t sum_of_threads_before(uint64_t own) {
  __shared__ uint64_t of_warps[kSortWarps];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  uint64_t sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, sum, unsigned(step));
    if (lane >= step) sum += below;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += of_warps[w];
  return sum - own;
}

// What blocks know of a digit, by a thread for its digit: first its own count, then with that of all blocks before it.
constexpr uint32_t kOwnKeys = 1u << 30, kKeysSoFar = 1u << 31, kKeyBits = kOwnKeys - 1;
static_assert(kMostInstances <= kKeyBits, "counts fit below the marks");
__device__ inline void publish_count(uint32_t* counts, unsigned block, uint32_t own) {
  volatile uint32_t* states = counts + threadIdx.x;
  states[int64_t(block) * kDigits] = (block == 0 ? kKeysSoFar : kOwnKeys) | own;
}
__device__ inline uint32_t count_before(uint32_t* counts, unsigned block, uint32_t own) {
  constexpr int kWindow = 8;  // blocks that are asked at once
  if (block == 0) return 0;
  volatile uint32_t* states = counts + threadIdx.x;
  uint32_t before = 0;
  bool is_done = false;
  for (int64_t last = int64_t(block) - 1; !is_done; last -= kWindow) {
    uint32_t words[kWindow];
#pragma unroll
    for (int w = 0; w < kWindow; ++w) {
      words[w] = kKeysSoFar;  // before the first block there is nothing
      if (last >= w) words[w] = states[(last - w) * kDigits];
    }
#pragma unroll
    for (int w = 0; w < kWindow; ++w) {
      if (is_done) break;
      while (words[w] == 0) words[w] = states[(last - w) * kDigits];
      before += words[w] & kKeyBits;
      is_done = (words[w] & kKeysSoFar) != 0;
    }
  }
  states[int64_t(block) * kDigits] = kKeysSoFar | (before + own);
  return before;
}

// The lanes whose bit is set where this lane's is, and not set where it is not. In C++ the compiler asks for the bit
// twice.
__device__ inline unsigned lanes_with_same(unsigned bit) {
  unsigned same;
  asm volatile(
      "{\n"
      ".reg .pred is_set;\n"
      "setp.ne.u32 is_set, %1, 0;\n"
      "vote.sync.ballot.b32 %0, is_set, 0xffffffff;\n"
      "@!is_set not.b32 %0, %0;\n"
      "}\n"
      : "=r"(same)
      : "r"(bit));
  return same;
}

// A block finds the place of each of its keys among those with the same digit, brings them in the order of their digits
// in shared memory, and writes them from there: neighbours to neighbouring places. What takes its time is waiting:
// values are asked for late and other blocks' counts later, so that registers suffice for many blocks.
template <class Key, int kBits>
__global__ __launch_bounds__(kSortThreads, at_least(5, kSortThreads)) void sort_pass_kernel(SortPass<Key> pass) {
  __shared__ uint32_t places[kSortWarps][kDigits];
  __shared__ uint32_t target_of[kDigits];  // where the digit's first goes, less its place in the block
  __shared__ Key staged_keys[kSortTile];
  __shared__ int32_t staged_values[kSortTile];
  __shared__ unsigned block_number, n_staged;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t n = pass.size.get();
  if (int64_t(blockIdx.x) * kSortTile >= n) return;
  if (thread == 0) block_number = atomicAdd(pass.ticket, 1u);
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) places[w][thread] = 0;
  __syncthreads();
  const unsigned block = block_number;
  const int64_t first = int64_t(block) * kSortTile;

  const auto digit = [&](Key key) { return digit_of(key, pass.shift, kBits); };
  const int of_lane = warp * kSortItems * 32 + lane;  // the first of the block's keys that is this lane's
  const int n_of_block = n - first < kSortTile ? int(n - first) : kSortTile;
  Key keys[kSortItems];
  uint32_t is_wanted = 0;  // one bit an item
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const int at = of_lane + i * 32;
    keys[i] = at < n_of_block ? pass.from.keys[first + at] : Key(0);
  }
  uint32_t ranks[kSortItems];  // among the warp's keys with the same digit
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const unsigned own_digit = digit(keys[i]);
    const bool takes_part = of_lane + i * 32 < n_of_block && (uint32_t(keys[i]) & pass.mask) <= pass.last;
    if (takes_part) is_wanted |= 1u << i;
    unsigned peers = __ballot_sync(kAllLanes, takes_part);
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit) peers &= lanes_with_same(own_digit & 1u << bit);
    const uint32_t before = places[warp][own_digit];
    ranks[i] = before + uint32_t(__popc(peers & ((1u << lane) - 1u)));
    __syncwarp();
    if (takes_part && lane == __ffs(int(peers)) - 1) places[warp][own_digit] = before + uint32_t(__popc(peers));
    __syncwarp();
  }
  __syncthreads();

  uint32_t count = 0;  // of the block's keys with this thread's digit
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    const uint32_t of_warp = places[w][thread];
    places[w][thread] = count;
    count += of_warp;
  }
  const bool is_digit = thread < 1 << kBits;
  if (is_digit) publish_count(pass.counts, block, count);
  const uint64_t firsts = sum_of_threads_before(uint64_t(pass.totals[thread]) << 32 | count);
  const uint32_t first_in_block = uint32_t(firsts), first_of_all = uint32_t(firsts >> 32);
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) places[w][thread] += first_in_block;
  if (thread == kSortThreads - 1) n_staged = first_in_block + count;
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    if ((is_wanted >> i & 1u) == 0) continue;
    ranks[i] += places[warp][digit(keys[i])];
    staged_keys[ranks[i]] = keys[i];
  }
  int32_t values[kSortItems];
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    values[i] = int32_t(first) + of_lane + i * 32;
    if (pass.from.values != nullptr && (is_wanted >> i & 1u) != 0) values[i] = pass.from.values[values[i]];
  }
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    if ((is_wanted >> i & 1u) != 0) staged_values[ranks[i]] = values[i];
  }
  if (is_digit) target_of[thread] = first_of_all + count_before(pass.counts, block, count) - first_in_block;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n_staged; i += kSortThreads) {
    const Key key = staged_keys[i];
    const uint32_t to = target_of[digit(key)] + i;
    if (pass.to.keys != nullptr) pass.to.keys[to] = key;
    pass.to.values[to] = staged_values[i];
  }
}

// What is sorted, and where it goes: passes go there and back between `there` and `back`, and the last one to `out`.
template <class Key>
struct SortJob {
  SortPair<const Key> from;
  SortPair<Key> there, back, out;
  uint32_t mask = UINT32_MAX, last = UINT32_MAX;  // see SortPass
};

// `n` is the number before the sort, `n_sorted` after it: less than that where keys are left out.
template <class Key>
void queue_sort(cudaStream_t stream, const SortState& state, const SortJob<Key>& job, const SortSize& n,
                const SortSize& n_sorted) {
  const Digits& digits = state.digits;
  const unsigned n_blocks = unsigned(state.n_blocks());
  constexpr unsigned kMostCountBlocks = 512;
  count_digits_kernel<<<std::min(n_blocks, kMostCountBlocks), kSortThreads, 0, stream>>>(
      job.from.keys, n, digits, job.mask, job.last, state.totals);
  SortPair<const Key> from = job.from;
  for (int i = 0; i < digits.n_passes; ++i) {
    const SortPair<Key>& to = i == digits.n_passes - 1 ? job.out : i % 2 == 0 ? job.there : job.back;
    const SortPass<Key> pass = {from,
                                to,
                                i == 0 ? n : n_sorted,
                                job.mask,
                                job.last,
                                i * digits.n_bits,
                                state.totals + i * kDigits,
                                state.counts + i * state.n_blocks() * kDigits,
                                state.tickets + i};
    const auto kernel = digits.n_bits == kMostDigitBits ? sort_pass_kernel<Key, kMostDigitBits>
                                                        : sort_pass_kernel<Key, kMostDigitBits - 1>;
    kernel<<<n_blocks, kSortThreads, 0, stream>>>(pass);
    from = {to.keys, to.values};
  }
}

}  // namespace cuda
}  // namespace spaceport
