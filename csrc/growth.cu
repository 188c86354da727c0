// growth: which rows stay, are cloned and are split, and the rows that come of it.
#define SPACEPORT_ISA cuda

#include <cub/device/device_radix_sort.cuh>

#include "growth_math.h"
#include "look_back.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = kLookBackRows;
constexpr int kWarps = kThreads / 32;
static_assert(kGrowthLists <= kWarps, "a warp looks back for each of the lists");

struct PlanScratch {
  uint64_t* lists;  // [kGrowthLists, n_blocks] of the look-back
  unsigned* ticket;
  int64_t* counts;            // [kGrowthLists]
  uint8_t* is_chosen;         // [N]
  char* cleared_end;          // what lies before is zero at the start
  uint32_t *keys, *sorted;    // [N]
  int32_t *numbers, *ranked;  // [N]
  char* library;
  size_t n_library_bytes;

  static PlanScratch of(Arena& arena, int64_t n) {
    PlanScratch s;
    s.lists = arena.take<uint64_t>(kGrowthLists * int64_t(n_blocks_of(n, kThreads)));
    s.ticket = arena.take<unsigned>(1);
    s.counts = arena.take<int64_t>(kGrowthLists);
    s.is_chosen = arena.take<uint8_t>(n);
    s.cleared_end = arena.take<char>(0);
    s.keys = arena.take<uint32_t>(n);
    s.sorted = arena.take<uint32_t>(n);
    s.numbers = arena.take<int32_t>(n);
    s.ranked = arena.take<int32_t>(n);
    s.n_library_bytes = 0;
    s.rank(nullptr, s.n_library_bytes, n, nullptr);
    s.library = arena.take<char>(int64_t(s.n_library_bytes));
    return s;
  }
  void rank(void* memory, size_t& n_bytes, int64_t n, cudaStream_t stream) const {
    check(cub::DeviceRadixSort::SortPairs(memory, n_bytes, keys, sorted, numbers, ranked, n, 0, 32, stream),
          "plan_growth");
  }
};

constexpr uint32_t kDoesNotGrow = 0xffffffffu;

// Smaller for higher scores; the bits of floats that are not negative are in their order.
__global__ __launch_bounds__(kThreads) void keys_kernel(const float* scores, int64_t n, float threshold,
                                                        PlanScratch out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  out.keys[i] = scores[i] >= threshold ? ~__float_as_uint(scores[i] + 0.0f) : kDoesNotGrow;
  out.numbers[i] = int32_t(i);
}

__global__ __launch_bounds__(kThreads) void choose_kernel(PlanScratch ranked, int64_t budget) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < budget && ranked.sorted[i] != kDoesNotGrow) ranked.is_chosen[ranked.ranked[i]] = 1;
}

// Called by a whole block: marks its rows of a table that hold NaN or infinity. Neighbouring threads read neighbouring
// numbers.
__device__ void mark_broken(const float* table, int n_columns, int64_t first, int n_rows, bool* is_broken) {
  const float* __restrict__ values = table + first * n_columns;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < n_rows * n_columns; i += kThreads) {
    if (!is_finite(values[i])) is_broken[i / n_columns] = true;
  }
}

__global__ __launch_bounds__(kThreads) void plan_kernel(Gaussians g, const float* scores, const uint8_t* is_chosen,
                                                        GrowthSettings settings, PlanScratch scratch,
                                                        int32_t* sources) {
  __shared__ unsigned block;
  __shared__ bool is_broken[kThreads];
  __shared__ unsigned of_warps[kGrowthLists][kWarps];
  __shared__ uint64_t before_block[kGrowthLists];
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (thread == 0) block = atomicAdd(scratch.ticket, 1u);
  is_broken[thread] = false;
  __syncthreads();
  const int64_t first = int64_t(block) * kThreads, row = first + thread;
  const int n_rows = g.n - first < kThreads ? int(g.n - first) : kThreads;
  mark_broken(g.means, 3, first, n_rows, is_broken);
  mark_broken(g.log_scales, 3, first, n_rows, is_broken);
  mark_broken(g.quaternions, 4, first, n_rows, is_broken);
  mark_broken(g.opacities, 1, first, n_rows, is_broken);
  mark_broken(g.sh, 3 * g.n_coefficients, first, n_rows, is_broken);
  __syncthreads();
  uint32_t fate = kDropped;
  if (row < g.n && !is_broken[thread]) {
    const bool grows = is_chosen != nullptr ? is_chosen[row] != 0 : scores[row] >= settings.threshold;
    fate = fate_of(g, row, grows, settings);
  }
  unsigned before_lane[kGrowthLists];
#pragma unroll
  for (int k = 0; k < kGrowthLists; ++k) {
    const unsigned votes = __ballot_sync(kAllLanes, fate >> k & 1);
    before_lane[k] = unsigned(__popc(votes & ((1u << lane) - 1)));
    if (lane == 0) of_warps[k][warp] = unsigned(__popc(votes));
  }
  __syncthreads();
  if (warp < kGrowthLists) {
    unsigned own = 0;
    for (int w = 0; w < kWarps; ++w) own += of_warps[warp][w];
    const uint64_t before = sum_before(scratch.lists + warp * gridDim.x, block, own);
    if (lane == 0) {
      before_block[warp] = before;
      if (block == gridDim.x - 1) scratch.counts[warp] = int64_t(before + own);
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kGrowthLists; ++k) {
    int64_t place = int64_t(before_block[k]) + before_lane[k];
    for (int w = 0; w < warp; ++w) place += of_warps[k][w];
    if (fate >> k & 1) sources[k * g.n + place] = int32_t(row);
  }
}

constexpr int kRowsPerBlock = 128;  // of the new rows

// Where the new rows of a block come from.
struct BlockOrigins {
  int64_t first;
  int n;
  int32_t rows[kRowsPerBlock];
  bool are_new[kRowsPerBlock];
  bool are_children[kRowsPerBlock];
  float offsets[kRowsPerBlock][3];
};

// Neighbouring threads copy neighbouring columns; change(value, slot, column) is what is written.
template <class T, class Change>
__device__ void copy_columns(const BlockOrigins& from, const T* __restrict__ table, T* __restrict__ out, int n_columns,
                             Change&& change) {
  out += from.first * n_columns;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < from.n * n_columns; i += kThreads) {
    const int slot = i / n_columns, column = i - slot * n_columns;
    out[i] = change(table[int64_t(from.rows[slot]) * n_columns + column], slot, column);
  }
}

struct AsItIs {
  template <class T>
  __device__ T operator()(const T& value, int, int) const {
    return value;
  }
};
struct ZeroIfNew {
  const BlockOrigins& from;

  template <class T>
  __device__ T operator()(const T& value, int slot, int) const {
    return from.are_new[slot] ? T{} : value;
  }
};

// SH by sixteen bytes where whole rows are such.
template <class Change>
__device__ void copy_sh(const BlockOrigins& from, const Gaussians& table, const Gaussians& out, Change&& change) {
  const int n_columns = 3 * table.n_coefficients;
  if (n_columns % 4 == 0) {
    copy_columns(from, reinterpret_cast<const float4*>(table.sh), reinterpret_cast<float4*>(out.sh), n_columns / 4,
                 change);
  } else {
    copy_columns(from, table.sh, out.sh, n_columns, change);
  }
}
template <class Change>
__device__ void copy_quaternions(const BlockOrigins& from, const Gaussians& table, const Gaussians& out,
                                 Change&& change) {
  copy_columns(from, reinterpret_cast<const float4*>(table.quaternions), reinterpret_cast<float4*>(out.quaternions), 1,
               change);
}

__global__ __launch_bounds__(kThreads) void grow_kernel(Rows rows, GrowthPlan plan, DrawKey key, Rows out) {
  __shared__ BlockOrigins from;
  const int slot = int(threadIdx.x);
  const int64_t first = int64_t(blockIdx.x) * kRowsPerBlock;
  if (slot == 0) {
    from.first = first;
    from.n = out.values.n - first < kRowsPerBlock ? int(out.values.n - first) : kRowsPerBlock;
  }
  if (slot < kRowsPerBlock && first + slot < out.values.n) {
    const Origin origin = origin_of(plan, first + slot);
    from.rows[slot] = origin.row;
    from.are_new[slot] = origin.kind != kStays;
    from.are_children[slot] = origin.kind >= kFirstChild;
    if (origin.kind >= kFirstChild) {
      const Vec3<float> offset = child_offset(rows.values, origin.row, uint32_t(origin.kind - kFirstChild), key);
      from.offsets[slot][0] = offset.x;
      from.offsets[slot][1] = offset.y;
      from.offsets[slot][2] = offset.z;
    }
  }
  __syncthreads();
  copy_columns(from, rows.values.means, out.values.means, 3, [](float mean, int row, int axis) {
    return from.are_children[row] ? mean + from.offsets[row][axis] : mean;
  });
  copy_columns(from, rows.values.log_scales, out.values.log_scales, 3, [](float log_scale, int row, int) {
    return from.are_children[row] ? log_scale + kLogChildSize : log_scale;
  });
  copy_quaternions(from, rows.values, out.values, AsItIs{});
  copy_columns(from, rows.values.opacities, out.values.opacities, 1, AsItIs{});
  copy_sh(from, rows.values, out.values, AsItIs{});
  const ZeroIfNew zero_if_new{from};
  for (int c = 0; c < rows.n_companions; ++c) {
    const Gaussians &companion = rows.companions[c], &out_companion = out.companions[c];
    copy_columns(from, companion.means, out_companion.means, 3, zero_if_new);
    copy_columns(from, companion.log_scales, out_companion.log_scales, 3, zero_if_new);
    copy_quaternions(from, companion, out_companion, zero_if_new);
    copy_columns(from, companion.opacities, out_companion.opacities, 1, zero_if_new);
    copy_sh(from, companion, out_companion, zero_if_new);
  }
}

}  // namespace
}  // namespace cuda

size_t plan_growth_scratch(const Cuda&, int64_t n_gaussians) {
  Arena arena(nullptr);
  cuda::PlanScratch::of(arena, n_gaussians);
  return arena.used();
}

GrowthCounts plan_growth(const Cuda& backend, const Gaussians& g, const float* scores, const GrowthSettings& settings,
                         void* scratch, int32_t* sources) {
  if (g.n == 0) return {};
  const cudaStream_t stream = stream_of(backend);
  const unsigned n_blocks = n_blocks_of(g.n, cuda::kThreads);
  Arena arena(scratch);
  cuda::PlanScratch s = cuda::PlanScratch::of(arena, g.n);
  check(cudaMemsetAsync(scratch, 0, size_t(s.cleared_end - static_cast<char*>(scratch)), stream), "plan_growth");
  const int64_t budget = settings.max_rows > g.n ? settings.max_rows - g.n : 0;
  const bool is_limited = settings.max_rows > 0 && budget < g.n;
  if (is_limited && budget > 0) {
    cuda::keys_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(scores, g.n, settings.threshold, s);
    s.rank(s.library, s.n_library_bytes, g.n, stream);
    cuda::choose_kernel<<<n_blocks_of(budget, cuda::kThreads), cuda::kThreads, 0, stream>>>(s, budget);
  }
  cuda::plan_kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(g, scores, is_limited ? s.is_chosen : nullptr, settings, s,
                                                             sources);
  check_launch("plan_growth");
  int64_t counts[kGrowthLists];
  check(cudaMemcpyAsync(counts, s.counts, sizeof(counts), cudaMemcpyDeviceToHost, stream), "plan_growth");
  check(cudaStreamSynchronize(stream), "plan_growth");
  return {counts[0], counts[1], counts[2]};
}

void grow(const Cuda& backend, const Rows& rows, const GrowthPlan& plan, const DrawKey& key, const Rows& out) {
  if (out.values.n == 0) return;
  cuda::grow_kernel<<<n_blocks_of(out.values.n, cuda::kRowsPerBlock), cuda::kThreads, 0, stream_of(backend)>>>(
      rows, plan, key, out);
  check_launch("grow");
}

void select_rows(const Cuda& backend, const Rows& rows, const int32_t* selected, const Rows& out) {
  const GrowthPlan all_stay = {const_cast<int32_t*>(selected), rows.values.n, {out.values.n, 0, 0}};
  grow(backend, rows, all_stay, {}, out);
}

}  // namespace spaceport
