// SH coefficients brought up to date after several steps at once. The gradient by a row's coefficients is the product
// of basis values, which follow from where the row and the camera are, and of one colour's gradient: three numbers to
// log instead of 45 with two moments each to read and write. Then the steps of Adam are made up for one after the
// other, in registers, each with its own rates: what differs from making them in time is that images are rendered with
// coefficients up to fifteen steps old, and that rows are seen from where they are in the end.
#define SPACEPORT_ISA cuda

#include <algorithm>

#include "queued.cuh"
#include "rows.cuh"
#include "sh_moments.cuh"
#include "step.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kRows = 32, kThreads = 256;  // of a block
constexpr unsigned kMostBlocks = 2640;     // several times what a large GPU holds: they take turns
constexpr int kConstantColumns = 3;
constexpr int kMaxDegree = 3;

__global__ void open_slot_kernel(ShLog log, Late<UpdateInputs> late_inputs, int n_coefficients,
                                 const uint32_t* is_halted) {
  if (*is_halted != 0) return;
  const UpdateInputs& u = *late_inputs.place_or_value();
  log.slots[*log.n] = {u.view.center, u.rates, u.settings.sh_rest, uint32_t(u.settings.step), n_coefficients};
  ++*log.n;
}

// The constant coefficient makes every step in time.
template <class Sh>
__global__ __launch_bounds__(kThreads) void update_constant_kernel(Sh sh, ShLog log, int n_columns,
                                                                   Late<UpdateInputs> late_inputs,
                                                                   const uint32_t* is_halted) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, n_values = kConstantColumns * log.n_rows;
  if (i >= n_values || *is_halted != 0) return;
  const UpdateInputs& u = *late_inputs.place_or_value();
  const int64_t row = i / kConstantColumns;
  const int column = int(i - row * kConstantColumns);
  Parameter<float> p = sh.load_one(row, n_columns, column);
  adam(p.value, kSh0 * log.colors[(*log.n - 1) * n_values + i], p.first, p.second, u.settings.sh_dc, u.rates);
  sh.store_one(p, row, n_columns, column, {uint32_t(u.settings.step)});
}

// The logged steps of all coefficients but the constant one, if there are `least` of them.
template <class Sh>
__global__ __launch_bounds__(kThreads) void flush_kernel(Sh sh, const float* means, int n_columns, ShLog log,
                                                         int least) {
  __shared__ float bases[kShSlots][kMaxShCoefficients - 1][kRows + 1];
  __shared__ float colors[kShSlots][kConstantColumns][kRows + 1];
  __shared__ ShSlot slots[kShSlots];
  const int n_slots = *log.n, thread = int(threadIdx.x), n_rest = n_columns - kConstantColumns;
  if (n_slots < least) return;
  if (thread < n_slots) slots[thread] = log.slots[thread];
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < log.n_rows; first += int64_t(gridDim.x) * kRows) {
    const int n = int(log.n_rows - first < kRows ? log.n_rows - first : kRows);
    __syncthreads();
    for (int i = thread; i < n_slots * kRows; i += kThreads) {
      const int s = i / kRows, row = i % kRows;
      if (row >= n) continue;
      const Vec3<float> color = load3(log.colors, s * log.n_rows + first + row);
      const bool is_seen = color.x != 0.0f || color.y != 0.0f || color.z != 0.0f;
      float basis[kMaxShCoefficients] = {};
      if (is_seen) sh_basis(kMaxDegree, direction(load3(means, first + row) - slots[s].center), basis);
#pragma unroll
      for (int k = 1; k < kMaxShCoefficients; ++k) bases[s][k - 1][row] = k < slots[s].n_coefficients ? basis[k] : 0.0f;
      colors[s][0][row] = color.x;
      colors[s][1][row] = color.y;
      colors[s][2][row] = color.z;
    }
    __syncthreads();
    for (int i = thread; i < n * n_rest; i += kThreads) {
      const int row = i / n_rest, rest = i - row * n_rest, k = rest / 3, channel = rest - 3 * k;
      const int column = rest + kConstantColumns;
      Parameter<float> p = sh.load_one(first + row, n_columns, column);
      for (int s = 0; s < n_slots; ++s) {
        adam(p.value, bases[s][k][row] * colors[s][channel][row], p.first, p.second, slots[s].rate, slots[s].rates);
      }
      sh.store_one(p, first + row, n_columns, column, {slots[n_slots - 1].step});
    }
  }
}

__global__ void clear_kernel(ShLog log, int least) {
  if (*log.n >= least) *log.n = 0;
}

}  // namespace

void queue_open_slot(cudaStream_t stream, const ShLog& log, const Late<UpdateInputs>& inputs, int n_coefficients,
                     const uint32_t* is_halted) {
  open_slot_kernel<<<1, 1, 0, stream>>>(log, inputs, n_coefficients, is_halted);
}

void queue_constant_update(cudaStream_t stream, const Gaussians& values, const AdamMoments& moments, const ShLog& log,
                           const Late<UpdateInputs>& inputs, const uint32_t* is_halted) {
  for_storage(values, moments, [&](const auto& sh) {
    update_constant_kernel<<<n_blocks_of(kConstantColumns * values.n, kThreads), kThreads, 0, stream>>>(
        sh, log, 3 * values.n_coefficients, inputs, is_halted);
  });
}

void queue_flush(cudaStream_t stream, const Gaussians& values, const AdamMoments& moments, const ShLog& log,
                 int least) {
  const unsigned n_blocks = std::min(n_blocks_of(values.n, kRows), kMostBlocks);
  for_storage(values, moments, [&](const auto& sh) {
    flush_kernel<<<n_blocks, kThreads, 0, stream>>>(sh, values.means, 3 * values.n_coefficients, log, least);
  });
  clear_kernel<<<1, 1, 0, stream>>>(log, least);
  check_launch("flush");
}

}  // namespace cuda

size_t sh_log_size(const Cuda&, int64_t n_gaussians) {
  Arena arena(nullptr);
  cuda::ShLog::of(arena, n_gaussians);
  return arena.used();
}

void flush_sh(const Cuda& backend, const Gaussians& values, const AdamMoments& moments, void* log) {
  Arena arena(log);
  cuda::queue_flush(stream_of(backend), values, moments, cuda::ShLog::of(arena, values.n), 1);
}

}  // namespace spaceport
