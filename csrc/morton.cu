// morton_order: rows along a curve that keeps neighbours in space together.
#define SPACEPORT_ISA cuda

#include <cub/device/device_radix_sort.cuh>

#include "growth_math.h"
#include "launch.cuh"
#include "warp.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kSides = 6;  // of the box: three low ones, three high ones

struct MortonScratch {
  uint32_t* sides;           // [6] bits in the order of the floats, those of the high sides inverted: the least of each
  uint64_t *codes, *sorted;  // [N]
  int32_t* numbers;          // [N]
  char* library;
  size_t n_library_bytes;

  static MortonScratch of(Arena& arena, int64_t n) {
    MortonScratch s;
    s.sides = arena.take<uint32_t>(kSides);
    s.codes = arena.take<uint64_t>(n);
    s.sorted = arena.take<uint64_t>(n);
    s.numbers = arena.take<int32_t>(n);
    s.n_library_bytes = 0;
    s.sort(nullptr, s.n_library_bytes, nullptr, n, nullptr);
    s.library = arena.take<char>(int64_t(s.n_library_bytes));
    return s;
  }
  void sort(void* memory, size_t& n_bytes, int32_t* order, int64_t n, cudaStream_t stream) const {
    check(cub::DeviceRadixSort::SortPairs(memory, n_bytes, codes, sorted, numbers, order, n, 0, 64, stream),
          "morton_order");
  }
};

constexpr uint32_t kSign = 0x80000000u;
__device__ inline uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & kSign ? ~bits : bits | kSign;
}
__device__ inline float float_of_ordered(uint32_t bits) {
  return __uint_as_float(bits & kSign ? bits & ~kSign : ~bits);
}

__global__ __launch_bounds__(kThreads) void box_kernel(const float* means, int64_t n, uint32_t* sides) {
  __shared__ uint32_t of_block[kSides];
  if (threadIdx.x < kSides) of_block[threadIdx.x] = ~0u;
  __syncthreads();
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool is_there = row < n && is_finite(means + 3 * row, 3);
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const uint32_t bits = is_there ? ordered_bits(means[3 * row + axis]) : 0;
    uint32_t low = is_there ? bits : ~0u, high = is_there ? ~bits : ~0u;
    for (int distance = 16; distance > 0; distance /= 2) {
      low = min(low, __shfl_xor_sync(kAllLanes, low, distance));
      high = min(high, __shfl_xor_sync(kAllLanes, high, distance));
    }
    if (threadIdx.x % 32 == 0) {
      atomicMin(&of_block[axis], low);
      atomicMin(&of_block[3 + axis], high);
    }
  }
  __syncthreads();
  if (threadIdx.x < kSides) atomicMin(&sides[threadIdx.x], of_block[threadIdx.x]);
}

__global__ __launch_bounds__(kThreads) void codes_kernel(const float* means, int64_t n, MortonScratch out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= n) return;
  Box box;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    box.low[axis] = float_of_ordered(out.sides[axis]);
    box.high[axis] = float_of_ordered(~out.sides[3 + axis]);
  }
  out.codes[row] = morton_code(means + 3 * row, box);
  out.numbers[row] = int32_t(row);
}

}  // namespace
}  // namespace cuda

size_t morton_order_scratch(const Cuda&, int64_t n_gaussians) {
  Arena arena(nullptr);
  cuda::MortonScratch::of(arena, n_gaussians);
  return arena.used();
}

void morton_order(const Cuda& backend, const Points& means, void* scratch, int32_t* order) {
  if (means.n == 0) return;
  const cudaStream_t stream = stream_of(backend);
  const unsigned n_blocks = n_blocks_of(means.n, cuda::kThreads);
  Arena arena(scratch);
  cuda::MortonScratch s = cuda::MortonScratch::of(arena, means.n);
  check(cudaMemsetAsync(s.sides, 0xff, cuda::kSides * sizeof(uint32_t), stream), "morton_order");
  cuda::box_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(means.values, means.n, s.sides);
  cuda::codes_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(means.values, means.n, s);
  s.sort(s.library, s.n_library_bytes, order, means.n, stream);
  check_launch("morton_order");
}

}  // namespace spaceport
