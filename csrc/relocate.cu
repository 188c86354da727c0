// relocate: rows that nobody sees move onto others.
#define SPACEPORT_ISA cuda

#include <cub/device/device_scan.cuh>

#include "growth_math.h"
#include "launch.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;

// [N] each.
struct RelocateScratch {
  uint64_t *weights, *sums;  // the sums up to and with each row
  int32_t* sources;          // what a row moves onto; -1: it stays
  int32_t* copies;           // rows that move onto it
  char* library;
  size_t n_library_bytes;

  static RelocateScratch of(Arena& arena, int64_t n) {
    RelocateScratch s;
    s.weights = arena.take<uint64_t>(n);
    s.sums = arena.take<uint64_t>(n);
    s.sources = arena.take<int32_t>(n);
    s.copies = arena.take<int32_t>(n);
    s.n_library_bytes = 0;
    s.add_up(nullptr, s.n_library_bytes, n, nullptr);
    s.library = arena.take<char>(int64_t(s.n_library_bytes));
    return s;
  }
  void add_up(void* memory, size_t& n_bytes, int64_t n, cudaStream_t stream) const {
    check(cub::DeviceScan::InclusiveSum(memory, n_bytes, weights, sums, n, stream), "relocate");
  }
};

__global__ __launch_bounds__(kThreads) void weigh_kernel(Gaussians g, float min_opacity, RelocateScratch s) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= g.n) return;
  s.weights[row] = weight_of(g, row, min_opacity);
  s.copies[row] = 0;
}

__global__ __launch_bounds__(kThreads) void draw_kernel(int64_t n, DrawKey key, RelocateScratch s) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= n) return;
  const uint64_t total = s.sums[n - 1];
  int32_t source = -1;
  if (s.weights[row] == 0 && total > 0) {
    const uint64_t drawn = draw_below(total, draw(key, kDrawSource, row, 0));
    int64_t low = 0, high = n - 1;
    while (low < high) {  // the first row whose sum lies above
      const int64_t middle = (low + high) / 2;
      if (s.sums[middle] <= drawn) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    source = int32_t(low);
    atomicAdd(&s.copies[source], 1);
  }
  s.sources[row] = source;
}

// Rows that move read those that stay: the latter change behind them.
__global__ __launch_bounds__(kThreads) void move_kernel(Rows rows, RelocateScratch s) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows.values.n || s.sources[row] < 0) return;
  copy_row(rows.values, s.sources[row], rows.values, row);
  become_copy(rows, row, 1 + s.copies[s.sources[row]]);
}

__global__ __launch_bounds__(kThreads) void share_kernel(Rows rows, RelocateScratch s) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows.values.n && s.copies[row] > 0) become_copy(rows, row, 1 + s.copies[row]);
}

}  // namespace
}  // namespace cuda

size_t relocate_scratch(const Cuda&, int64_t n_gaussians) {
  Arena arena(nullptr);
  cuda::RelocateScratch::of(arena, n_gaussians);
  return arena.used();
}

void relocate(const Cuda& backend, const Rows& rows, const Relocation& settings, void* scratch) {
  const int64_t n = rows.values.n;
  if (n == 0) return;
  const cudaStream_t stream = stream_of(backend);
  const unsigned n_blocks = n_blocks_of(n, cuda::kThreads);
  Arena arena(scratch);
  cuda::RelocateScratch s = cuda::RelocateScratch::of(arena, n);
  cuda::weigh_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(rows.values, settings.min_opacity, s);
  s.add_up(s.library, s.n_library_bytes, n, stream);
  cuda::draw_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(n, settings.key, s);
  cuda::move_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(rows, s);
  cuda::share_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(rows, s);
  check_launch("relocate");
}

}  // namespace spaceport
