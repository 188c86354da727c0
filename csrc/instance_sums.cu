// A stable radix sort of the instances by splat, and one group of lanes a splat that adds up its rows.
#include "instance_sums.cuh"

#include <cub/device/device_radix_sort.cuh>

#include "warp.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;  // lanes: most splats have a handful of instances

struct Sorted {
  uint32_t* splats;    // [I]
  int32_t* instances;  // [I]
  char* library;
  size_t n_library_bytes;

  static Sorted of(Arena& arena, int64_t n_instances, int n_bits) {
    Sorted s = {arena.take<uint32_t>(n_instances), arena.take<int32_t>(n_instances), nullptr, 0};
    s.sort(InstanceSums{nullptr, nullptr, nullptr, n_instances, 0}, n_bits, nullptr);
    s.library = arena.take<char>(int64_t(s.n_library_bytes));
    return s;
  }
  // Without memory for the library, only asks how much it needs.
  void sort(const InstanceSums& from, int n_bits, cudaStream_t stream) {
    check(cub::DeviceRadixSort::SortPairs(library, n_library_bytes, from.splats, splats, from.instances, instances,
                                          from.n, 0, n_bits, stream),
          "blend'");
  }
};

// kNoSplat is the largest of them, whatever the number of splats.
int bits_of_splats(int64_t n_splats) {
  int n_bits = 1;
  while (n_splats >> n_bits) ++n_bits;
  return n_bits;
}

template <int kColumns>
__global__ __launch_bounds__(kThreads) void add_up_kernel(Sorted sorted, const float* rows, int64_t n,
                                                          float* of_splats) {
  const int lane = int(threadIdx.x % kGroup), shift = int(threadIdx.x % 32) - lane;
  const unsigned group = kAllLanes >> (32 - kGroup) << shift;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const uint32_t splat = i < n ? sorted.splats[i] : kNoSplat;
  const bool is_first = splat != kNoSplat && (i == 0 || sorted.splats[i - 1] != splat);
  for (unsigned firsts = __ballot_sync(group, is_first) >> shift; firsts != 0; firsts &= firsts - 1) {
    const int first = __ffs(int(firsts)) - 1;
    const uint32_t own = __shfl_sync(group, splat, first, kGroup);
    float sums[kColumns] = {};
    for (int64_t j = i + first; j < n && sorted.splats[j] == own; j += kGroup) {
      const float* row = rows + int64_t(sorted.instances[j]) * kColumns;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sums[k] += row[k];
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      for (int distance = kGroup / 2; distance > 0; distance /= 2) {
        sums[k] += __shfl_xor_sync(group, sums[k], distance);
      }
      if (k % kGroup == lane) of_splats[int64_t(own) * kColumns + k] = sums[k];
    }
  }
}

}  // namespace

void queue_clear(cudaStream_t stream, const InstanceSums& sums) {
  check(cudaMemsetAsync(sums.splats, 0xff, size_t(sums.n) * sizeof(uint32_t), stream), "blend'");
  check(cudaMemsetAsync(sums.instances, 0, size_t(sums.n) * sizeof(int32_t), stream), "blend'");  // are sorted as well
}

size_t queued_add_up_scratch(int64_t n_splats, int64_t n_instances) {
  Arena arena(nullptr);
  Sorted::of(arena, n_instances, bits_of_splats(n_splats));
  return arena.used();
}

void queue_add_up(cudaStream_t stream, const InstanceSums& sums, int64_t n_splats, void* scratch, float* of_splats) {
  if (sums.n == 0) return;
  const int n_bits = bits_of_splats(n_splats);
  Arena arena(scratch);
  Sorted sorted = Sorted::of(arena, sums.n, n_bits);
  sorted.sort(sums, n_bits, stream);
  for_columns(sums.n_columns, [&](auto columns) {
    add_up_kernel<columns>
        <<<n_blocks_of(sums.n, kThreads), kThreads, 0, stream>>>(sorted, sums.rows, sums.n, of_splats);
  });
  check_launch("blend'");
}

}  // namespace cuda
}  // namespace spaceport
