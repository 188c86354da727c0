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
constexpr int kSortItems = 16;  // keys of a thread
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
  uint32_t* counts;   // [n_passes, n_blocks, digits] of a block alone, or of it and all before: the mark says which
  unsigned* tickets;  // [n_passes] blocks take numbers in the order in which they start

  static SortState of(Arena& arena, int64_t most, int n_key_bits) {
    SortState s = {Digits::of(n_key_bits), most, nullptr, nullptr, nullptr};
    s.totals = arena.take<uint32_t>(int64_t(s.digits.n_passes) * kDigits);
    s.counts = arena.take<uint32_t>(s.digits.n_passes * s.n_counts());
    s.tickets = arena.take<unsigned>(s.digits.n_passes);
    return s;
  }
  int64_t n_blocks() const { return n_blocks_of(most, kSortTile); }
  int64_t n_counts() const { return n_blocks() << digits.n_bits; }  // of a pass
};

template <class Key>
struct SortPair {
  Key* keys;
  int32_t* values;
};

// What has a larger key than `last` below the mask is left out of a sort; short keys never are.
struct KeyFilter {
  uint32_t mask = UINT32_MAX, last = UINT32_MAX;

  __device__ bool passes(uint32_t key) const { return (key & mask) <= last; }
  __device__ bool passes(uint16_t) const { return true; }
};

template <class Key>
struct SortPass {
  SortPair<const Key> from;  // values null: 0, 1, 2, ...
  SortPair<Key> to;          // keys null: not wanted
  SortSize size;
  KeyFilter filter;
  int shift;
  const uint32_t* totals;
  uint32_t* counts;
  unsigned* ticket;
};

// How many keys have each value of each digit. Copies keep lanes apart that count the same.
template <class Key, int kBits>
__global__ __launch_bounds__(kSortThreads) void count_digits_kernel(const Key* keys, SortSize size, int n_passes,
                                                                    KeyFilter filter, uint32_t* totals) {
  constexpr int kDigits = 1 << kBits, kMostPasses = int(sizeof(Key)) * 8 / kMostDigitBits;
  constexpr int kCopies = 8, kKeys = 16 / int(sizeof(Key));
  __shared__ uint32_t counts[kMostPasses][kDigits][kCopies];
  for (int i = int(threadIdx.x); i < kMostPasses * kDigits * kCopies; i += kSortThreads) (&counts[0][0][0])[i] = 0;
  __syncthreads();
  const auto count = [&](Key key) {
    if (!filter.passes(key)) return;
#pragma unroll
    for (int pass = 0; pass < kMostPasses; ++pass) {
      if (pass < n_passes) atomicAdd(&counts[pass][digit_of(key, pass * kBits, kBits)][threadIdx.x % kCopies], 1u);
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
  for (int i = int(threadIdx.x); i < n_passes * kDigits; i += kSortThreads) {
    const int pass = i / kDigits, digit = i % kDigits;
    uint32_t sum = 0;
    for (int copy = 0; copy < kCopies; ++copy) sum += counts[pass][digit][(copy + digit) % kCopies];
    if (sum != 0) atomicAdd(totals + pass * cuda::kDigits + digit, sum);
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
template <int kBits>
__device__ void publish_count(uint32_t* counts, unsigned block, uint32_t own) {
  volatile uint32_t* states = counts + threadIdx.x;
  states[int64_t(block) << kBits] = (block == 0 ? kKeysSoFar : kOwnKeys) | own;
}
template <int kBits>
__device__ uint32_t count_before(uint32_t* counts, unsigned block, uint32_t own) {
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
      if (last >= w) words[w] = states[(last - w) << kBits];
    }
#pragma unroll
    for (int w = 0; w < kWindow; ++w) {
      if (is_done) break;
      while (words[w] == 0) words[w] = states[(last - w) << kBits];
      before += words[w] & kKeyBits;
      is_done = (words[w] & kKeysSoFar) != 0;
    }
  }
  states[int64_t(block) << kBits] = kKeysSoFar | (before + own);
  return before;
}

// `n` numbers of a thread that are as short as kBits: many in a register.
template <int n, int kBits>
class Packed {
 public:
  __device__ void set(int i, uint32_t value) {  // in ascending order
    uint32_t& word = words_[i / kOfWord];
    word = i % kOfWord == 0 ? value : word | value << shift(i);
  }
  __device__ void add(int i, uint32_t more) { words_[i / kOfWord] += more << shift(i); }
  __device__ uint32_t operator[](int i) const { return words_[i / kOfWord] >> shift(i) & (UINT32_MAX >> (32 - kBits)); }

 private:
  static constexpr int kOfWord = 32 / kBits;
  __device__ static int shift(int i) { return i % kOfWord * kBits; }
  uint32_t words_[(n + kOfWord - 1) / kOfWord];
};

// A block finds the place of each of its keys among those with the same digit, brings them in the order of their digits
// in shared memory, and writes them from there: neighbours to neighbouring places; then their values. What takes its
// time is waiting: values are asked for late and other blocks' counts later, so that registers suffice for many blocks.
template <class Key, int kBits>
__global__ __launch_bounds__(kSortThreads, at_least(4, kSortThreads)) void sort_pass_kernel(SortPass<Key> pass) {
  constexpr int kDigits = 1 << kBits;
  __shared__ uint32_t places[kSortWarps][kDigits];
  __shared__ uint32_t target_of[kDigits];  // where the digit's first goes, less its place in the block
  __shared__ union {
    unsigned peers[kSortWarps][kDigits];  // of a warp's lanes, those with the same digit
    Key keys[kSortTile];
    int32_t values[kSortTile];
  } staged;
  __shared__ unsigned block_number, n_staged;
  __shared__ int shift_of_all;  // or the compiler would keep digits that it can work out again
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t n = pass.size.get();
  if (int64_t(blockIdx.x) * kSortTile >= n) return;
  if (thread == 0) {
    block_number = atomicAdd(pass.ticket, 1u);
    shift_of_all = pass.shift;
  }
  for (int i = thread; i < kSortWarps * kDigits; i += kSortThreads) {
    (&places[0][0])[i] = 0;
    (&staged.peers[0][0])[i] = 0;
  }
  __syncthreads();
  const unsigned block = block_number;
  const int64_t first = int64_t(block) * kSortTile;

  const auto digit = [&](Key key) { return digit_of(key, pass.shift, kBits); };
  const int of_lane = warp * kSortItems * 32 + lane;  // the first of the block's keys that is this lane's
  const int n_from_lane = (n - first < kSortTile ? int(n - first) : kSortTile) - of_lane;  // of the block
  const Key* from_keys = pass.from.keys + first + of_lane;
  Packed<kSortItems, 8 * int(sizeof(Key))> keys;
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    keys.set(i, i * 32 < n_from_lane ? from_keys[i * 32] : Key(0));
  }
  const auto is_wanted = [&](int i) { return i * 32 < n_from_lane && pass.filter.passes(Key(keys[i])); };
  unsigned* peers_of = staged.peers[warp];
  const unsigned lane_bit = kept(1u << lane);
  Packed<kSortItems, 16> ranks;  // among the warp's keys with the same digit
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const unsigned own_digit = digit(Key(keys[i]));
    atomicOr(peers_of + own_digit, is_wanted(i) ? lane_bit : 0u);
    __syncwarp();
    const unsigned peers = peers_of[own_digit];
    const uint32_t before = places[warp][own_digit];
    ranks.set(i, before + uint32_t(__popc(peers & (lane_bit - 1u))));
    __syncwarp();
    if (peers >> lane == 1) {  // the last of them
      places[warp][own_digit] = before + uint32_t(__popc(peers));
      peers_of[own_digit] = 0;
    }
    __syncwarp();
  }
  __syncthreads();

  const bool is_digit = thread < kDigits;
  uint32_t count = 0;  // of the block's keys with this thread's digit
  uint32_t total = 0;  // of all keys
  if (is_digit) {
    total = pass.totals[thread];
#pragma unroll
    for (int w = 0; w < kSortWarps; ++w) {
      const uint32_t of_warp = places[w][thread];
      places[w][thread] = count;
      count += of_warp;
    }
    publish_count<kBits>(pass.counts, block, count);
  }
  const uint64_t firsts = sum_of_threads_before(uint64_t(total) << 32 | count);
  const uint32_t first_in_block = uint32_t(firsts), first_of_all = uint32_t(firsts >> 32);
  if (is_digit) {
#pragma unroll
    for (int w = 0; w < kSortWarps; ++w) places[w][thread] += first_in_block;
  }
  if (thread == kSortThreads - 1) n_staged = first_in_block + count;
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    ranks.add(i, places[warp][digit_of(Key(keys[i]), shift_of_all, kBits)]);
    if (is_wanted(i)) staged.keys[ranks[i]] = Key(keys[i]);
  }
  const int64_t first_again = int64_t(block_number) * kSortTile;  // read again, not kept
  const int32_t* from_values = pass.from.values + first_again + of_lane;
  int32_t values[kSortItems];
  if (pass.from.values != nullptr) {
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      if (is_wanted(i)) values[i] = from_values[i * 32];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) values[i] = int32_t(first_again) + of_lane + i * 32;
  }
  if (is_digit) target_of[thread] = first_of_all + count_before<kBits>(pass.counts, block, count) - first_in_block;
  __syncthreads();
  const uint32_t n_kept = n_staged;
  Packed<kSortItems, 8> digits;  // of every kSortThreads-th in their new order
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const uint32_t at = uint32_t(thread + i * kSortThreads);
    const Key key = staged.keys[at];
    const uint32_t to = target_of[digit(key)] + at;
    digits.set(i, digit(key));
    if (at < n_kept && pass.to.keys != nullptr) pass.to.keys[to] = key;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    if (is_wanted(i)) staged.values[ranks[i]] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const uint32_t at = uint32_t(thread + i * kSortThreads);
    const uint32_t to = target_of[digits[i]] + at;
    const int32_t value = staged.values[at];
    if (at < n_kept) pass.to.values[to] = value;
  }
}

// What is sorted, and where it goes: passes go there and back between `there` and `back`, and the last one to `out`.
template <class Key>
struct SortJob {
  SortPair<const Key> from;
  SortPair<Key> there, back, out;
  KeyFilter filter;
};

// `n` is the number before the sort, `n_sorted` after it: less than that where keys are left out.
template <class Key, int kBits>
void queue_sort_by_digits(cudaStream_t stream, const SortState& state, const SortJob<Key>& job, const SortSize& n,
                          const SortSize& n_sorted) {
  const int n_passes = state.digits.n_passes;
  const unsigned n_blocks = unsigned(state.n_blocks());
  constexpr unsigned kMostCountBlocks = 512;
  count_digits_kernel<Key, kBits><<<std::min(n_blocks, kMostCountBlocks), kSortThreads, 0, stream>>>(
      job.from.keys, n, n_passes, job.filter, state.totals);
  SortPair<const Key> from = job.from;
  for (int i = 0; i < n_passes; ++i) {
    const SortPair<Key>& to = i == n_passes - 1 ? job.out : i % 2 == 0 ? job.there : job.back;
    const SortPass<Key> pass = {from,
                                to,
                                i == 0 ? n : n_sorted,
                                job.filter,
                                i * kBits,
                                state.totals + i * kDigits,
                                state.counts + i * state.n_counts(),
                                state.tickets + i};
    sort_pass_kernel<Key, kBits><<<n_blocks, kSortThreads, 0, stream>>>(pass);
    from = {to.keys, to.values};
  }
}
template <class Key>
void queue_sort(cudaStream_t stream, const SortState& state, const SortJob<Key>& job, const SortSize& n,
                const SortSize& n_sorted) {
  const auto queue = state.digits.n_bits == kMostDigitBits ? queue_sort_by_digits<Key, kMostDigitBits>
                                                           : queue_sort_by_digits<Key, kMostDigitBits - 1>;
  queue(stream, state, job, n, n_sorted);
}

}  // namespace cuda
}  // namespace spaceport
