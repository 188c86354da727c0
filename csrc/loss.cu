// loss: L1 + D-SSIM and its gradient. Two passes over blocks of the image: the local moments, SSIM and its derivatives;
// then those derivatives filtered back onto the pixels. Windows are separable; a thread filters eight pixels of a row
// at once, then six of a column, so that what it loads serves several of them.
//
// The kernels are compiled twice: for a plain loss, and for one with a mask, an exposure or no padding.
#define SPACEPORT_ISA cuda

#include "queued.cuh"
#include "ssim_math.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kWidth = 32, kHeight = 36;  // pixels of a block
constexpr int kAcross = 8, kDown = 6;     // pixels that a thread filters at once
constexpr int kThreads = kWidth * kHeight / kDown;
constexpr int kHaloWidth = kWidth + 2 * kRadius, kHaloHeight = kHeight + 2 * kRadius;
constexpr int kMoments = 4, kDerivatives = 3;
// Rows are read four pixels at a time, from `kLead` before the halo; and have such a length that the lanes of a warp
// read different banks.
constexpr int kLead = 3, kFours = (kLead + kHaloWidth + kLead) / 4, kRowLength = 52;
static_assert((kLead + kRadius) % 4 == 0 && kRowLength % 32 == 20 && kRowLength >= 4 * kFours, "rows of fours");
using Plane = float[kHaloHeight][kRowLength];
using FilteredPlane = float[kHaloHeight][kWidth + 1];
constexpr unsigned kExposureBlocks = 256;

// Of |difference| and of SSIM.
struct LossSums {
  double l1, ssim;
};
// What the gradients of L1 and of SSIM are multiplied by at each pixel.
struct LossFactors {
  float l1, ssim;
};

// Numbers of a map of derivatives, whose rows are as long as the blocks of a row.
__host__ __device__ int64_t map_size(unsigned n_blocks, int height) {
  return int64_t(n_blocks) * kWidth * height;
}

struct LossScratch {
  float* derivatives;    // [kDerivatives, kChannels, H, stride], zero behind the image's width
  LossSums* sums;        // [n_blocks]
  LossSums* weights;     // [n_blocks], of the pixels
  LossFactors* factors;  // of a loss that is not plain
  float* d_exposure;     // [kExposureSize, kExposureBlocks]

  static LossScratch of(Arena& arena, int width, int height) {
    const int64_t n_blocks = int64_t(n_blocks_of(width, kWidth)) * n_blocks_of(height, kHeight);
    return {arena.take<float>(kDerivatives * kChannels * map_size(n_blocks_of(width, kWidth), height)),
            arena.take<LossSums>(n_blocks), arena.take<LossSums>(n_blocks), arena.take<LossFactors>(1),
            arena.take<float>(int64_t(kExposureSize) * kExposureBlocks)};
  }
};

// Sum over the block's threads, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, unsigned(step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (const double part : warp_sums) sum += part;
  }
  return sum;
}

// What is filtered across takes the place of what it is made of.
template <int kLoaded, int kFiltered>
union Filtering {
  Plane planes[kLoaded];
  FilteredPlane across[kFiltered];
};

// Filters `kPlanes` quantities across: value(loaded, values) makes them of what the `kLoaded` planes hold at one place.
template <int kLoaded, int kPlanes, class Value>
__device__ void filter_across(Filtering<kLoaded, kPlanes>& memory, Value&& value) {
  constexpr int kTasks = kHaloHeight * (kWidth / kAcross);
  static_assert(kTasks <= kThreads, "a task each");
  const int row = int(threadIdx.x) / (kWidth / kAcross), first = int(threadIdx.x) % (kWidth / kAcross) * kAcross;
  float sums[kPlanes][kAcross] = {};
  if (int(threadIdx.x) < kTasks) {
    float4 fours[kLoaded];
#pragma unroll
    for (int i = 0; i < kAcross + kTaps - 1; ++i) {
      float loaded[kLoaded], values[kPlanes];
      const int at = kLead + i, of_four = at % 4;
#pragma unroll
      for (int plane = 0; plane < kLoaded; ++plane) {
        const float* row_of = memory.planes[plane][row] + first;
        if (i == 0 || of_four == 0) fours[plane] = *reinterpret_cast<const float4*>(row_of + at - of_four);
        const float4& four = fours[plane];
        loaded[plane] = of_four == 0 ? four.x : of_four == 1 ? four.y : of_four == 2 ? four.z : four.w;
      }
      value(loaded, values);
#pragma unroll
      for (int pixel = 0; pixel < kAcross; ++pixel) {
        if (i - pixel < 0 || i - pixel >= kTaps) continue;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          sums[plane][pixel] = fmaf(kWindow[i - pixel], values[plane], sums[plane][pixel]);
        }
      }
    }
  }
  __syncthreads();  // the planes are read, and may be written over
  if (int(threadIdx.x) >= kTasks) return;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int pixel = 0; pixel < kAcross; ++pixel) memory.across[plane][row][first + pixel] = sums[plane][pixel];
  }
}

// And down: out[plane][i] is that of the thread's pixel `column_of()`, `row_of(i)`.
__device__ int column_of() {
  return int(threadIdx.x) % kWidth;
}
__device__ int row_of(int i) {
  return int(threadIdx.x) / kWidth * kDown + i;
}
template <int kPlanes>
__device__ void filter_down(const FilteredPlane* across, float out[kPlanes][kDown]) {
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int pixel = 0; pixel < kDown; ++pixel) out[plane][pixel] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDown + kTaps - 1; ++i) {
      const float value = across[plane][row_of(i)][column_of()];
#pragma unroll
      for (int pixel = 0; pixel < kDown; ++pixel) {
        if (i - pixel < 0 || i - pixel >= kTaps) continue;
        out[plane][pixel] = fmaf(kWindow[i - pixel], value, out[plane][pixel]);
      }
    }
  }
}

// Fills two planes with the block's pixels and their halo: fetch(place in the image, values) reads a pixel; outside it
// all is zero. Several are read before any is written, so that the block does not wait for memory at each.
template <class Fetch>
__device__ void load_pixels(int width, int height, Fetch&& fetch, Plane planes[2]) {
  constexpr int kPixels = kHaloHeight * kHaloWidth, kAtOnce = 6;
  const int left = int(blockIdx.x) * kWidth - kRadius, top = int(blockIdx.y) * kHeight - kRadius;
  for (int begin = int(threadIdx.x); begin < kPixels; begin += kAtOnce * kThreads) {
    float values[kAtOnce][2] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * kThreads, row = i / kHaloWidth;
      const int x = left + i - row * kHaloWidth, y = top + row;
      if (i < kPixels && x >= 0 && x < width && y >= 0 && y < height) fetch(y * width + x, values[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * kThreads, row = i / kHaloWidth;
      if (i >= kPixels) continue;
#pragma unroll
      for (int plane = 0; plane < 2; ++plane) planes[plane][row][kLead + i - row * kHaloWidth] = values[j][plane];
    }
  }
}

// Fills planes with the maps around the block at (left, top), all of them read before any is written.
__device__ void load_maps(const float* maps, int64_t distance, int stride, int height, int left, int top,
                          Plane planes[kDerivatives]) {
  constexpr int kTasks = kHaloHeight * kFours, kEach = (kTasks + kThreads - 1) / kThreads;
  float4 fours[kEach][kDerivatives] = {};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int task = int(threadIdx.x) + j * kThreads, row = task / kFours;
    const int x = left - kRadius - kLead + 4 * (task - row * kFours), y = top - kRadius + row;
    if (task >= kTasks || x < 0 || x >= stride || y < 0 || y >= height) continue;
#pragma unroll
    for (int map = 0; map < kDerivatives; ++map) {
      fours[j][map] = *reinterpret_cast<const float4*>(maps + map * distance + int64_t(y) * stride + x);
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int task = int(threadIdx.x) + j * kThreads, row = task / kFours;
    if (task >= kTasks) continue;
#pragma unroll
    for (int map = 0; map < kDerivatives; ++map) {
      *reinterpret_cast<float4*>(&planes[map][row][4 * (task - row * kFours)]) = fours[j][map];
    }
  }
}

__device__ float shade_of(uint8_t level) {
  return float(level) * (1.0f / 255.0f);
}

// A pixel's colour and that of the photo, in one channel, as they are compared.
struct Pair {
  float x, y;
};
// How the pixels of an image are compared. A plain comparison knows no mask and no exposure.
template <bool kIsPlain>
struct Comparison {
  const float* color;
  LossTarget target;

  // Of the pixel `at`; all its numbers fit an int.
  __device__ float weight(int at) const {
    return kIsPlain || target.mask == nullptr ? 1.0f : shade_of(target.mask[at]);
  }
  __device__ Pair pair(int at, int channel) const {
    const float y = shade_of(target.photo[kChannels * at + channel]);
    if (kIsPlain) return {color[kChannels * at + channel], y};
    const float x = target.exposure == nullptr ? color[kChannels * at + channel]
                                               : exposed(target.exposure, color + kChannels * at, channel);
    return {weight(at) * x, weight(at) * y};
  }
};

template <bool kIsPlain>
__global__ __launch_bounds__(kThreads, at_least(kIsPlain ? 6 : 3, kThreads)) void moments_kernel(
    LossImages images, Late<LossTarget> target, int margin, LossScratch scratch) {
  __shared__ __align__(16) Filtering<2, kMoments> memory;
  const Plane &x = memory.planes[0], &y = memory.planes[1];
  const Comparison<kIsPlain> comparison = {images.color, target.get()};
  const int column = int(blockIdx.x) * kWidth + column_of(), top = int(blockIdx.y) * kHeight;
  const int stride = int(gridDim.x) * kWidth;
  const int64_t of_map = map_size(gridDim.x, images.height);
  float l1 = 0.0f, ssim = 0.0f, l1_weight = 0.0f, ssim_weight = 0.0f;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    load_pixels(
        images.width, images.height,
        [&](int at, float* values) {
          const Pair pair = comparison.pair(at, channel);
          values[0] = pair.x;
          values[1] = pair.y;
        },
        memory.planes);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      if (column >= images.width || top + row_of(i) >= images.height) continue;
      constexpr int kCenter = kLead + kRadius;
      l1 += fabsf(x[row_of(i) + kRadius][column_of() + kCenter] - y[row_of(i) + kRadius][column_of() + kCenter]);
    }
    filter_across<2, kMoments>(  // E[x^2] and E[y^2] are only ever needed as their sum
        memory, [](const float* loaded, float* values) {
          values[0] = loaded[0];
          values[1] = loaded[1];
          values[2] = fmaf(loaded[0], loaded[0], loaded[1] * loaded[1]);
          values[3] = loaded[0] * loaded[1];
        });
    __syncthreads();
    float moments[kMoments][kDown];
    filter_down<kMoments>(memory.across, moments);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const int row = top + row_of(i);
      if (row >= images.height) continue;
      float* to = scratch.derivatives + channel * of_map + int64_t(row) * stride + column;
      if (column >= images.width) {
        to[0] = to[kChannels * of_map] = to[2 * kChannels * of_map] = 0.0f;
        continue;
      }
      const float own[5] = {moments[0][i], moments[1][i], moments[2][i], 0.0f, moments[3][i]};
      SsimDerivatives<float> d = ssim_of(own);
      if (!kIsPlain) {
        const float weight = comparison.weight(row * images.width + column);
        const bool is_inner =
            column >= margin && column < images.width - margin && row >= margin && row < images.height - margin;
        const float inner_weight = is_inner ? weight : 0.0f;
        d = {inner_weight * d.ssim, inner_weight * d.by_mean, inner_weight * d.by_square, inner_weight * d.by_product};
        l1_weight += weight;
        ssim_weight += inner_weight;
      }
      ssim += d.ssim;
      to[0] = d.by_mean;
      to[kChannels * of_map] = d.by_square;
      to[2 * kChannels * of_map] = d.by_product;
    }
  }
  const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const double l1_sum = block_sum(double(l1)), ssim_sum = block_sum(double(ssim));
  if (threadIdx.x == 0) scratch.sums[block] = {l1_sum, ssim_sum};
  if (!kIsPlain) {
    const double l1_total = block_sum(double(l1_weight)), ssim_total = block_sum(double(ssim_weight));
    if (threadIdx.x == 0) scratch.weights[block] = {l1_total, ssim_total};
  }
}

// The sum of the blocks' sums, always in the same order; called by a whole block, for its first thread.
__device__ LossSums total_of(const LossSums* sums, int64_t n_sums) {
  double l1 = 0.0, ssim = 0.0;
  for (int64_t i = threadIdx.x; i < n_sums; i += kThreads) {
    l1 += sums[i].l1;
    ssim += sums[i].ssim;
  }
  const double l1_sum = block_sum(l1), ssim_sum = block_sum(ssim);
  return {l1_sum, ssim_sum};
}

// The means and factors of a loss whose weights are only known now: one block. `shares` of L1 and of SSIM in the loss.
__global__ __launch_bounds__(kThreads) void weigh_kernel(LossScratch scratch, int64_t n_sums, LossSums shares,
                                                         double* means) {
  const LossSums sums = total_of(scratch.sums, n_sums), weights = total_of(scratch.weights, n_sums);
  if (threadIdx.x != 0) return;
  means[0] = weights.l1 > 0.0 ? sums.l1 / weights.l1 : 0.0;
  means[1] = weights.ssim > 0.0 ? sums.ssim / weights.ssim : 1.0;
  *scratch.factors = {weights.l1 > 0.0 ? float(shares.l1 / weights.l1) : 0.0f,
                      weights.ssim > 0.0 ? float(shares.ssim / weights.ssim) : 0.0f};
}

template <bool kIsPlain>
__global__ __launch_bounds__(kThreads, at_least(kIsPlain ? 5 : 2, kThreads)) void gradient_kernel(
    LossImages images, Late<LossTarget> target, LossScratch scratch, LossFactors factors, LossOutput out) {
  if (kIsPlain && blockIdx.x == 0 && blockIdx.y == 0) {
    const LossSums sums = total_of(scratch.sums, int64_t(gridDim.x) * gridDim.y);
    const double n_values = double(images.width) * images.height * kChannels;
    if (threadIdx.x == 0) {
      out.means[0] = sums.l1 / n_values;
      out.means[1] = sums.ssim / n_values;
    }
  }
  if (!kIsPlain) factors = *scratch.factors;
  const Comparison<kIsPlain> comparison = {images.color, target.get()};
  __shared__ __align__(16) Filtering<kDerivatives, kDerivatives> memory;
  // The last maps first: they are still in the second-level cache.
  const int left = int(gridDim.x - 1 - blockIdx.x) * kWidth, top = int(gridDim.y - 1 - blockIdx.y) * kHeight;
  const int column = left + column_of(), stride = int(gridDim.x) * kWidth;
  const int64_t of_map = map_size(gridDim.x, images.height);
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    load_maps(scratch.derivatives + channel * of_map, kChannels * of_map, stride, images.height, left, top,
              memory.planes);
    __syncthreads();
    filter_across<kDerivatives, kDerivatives>(memory, [](const float* loaded, float* values) {
#pragma unroll
      for (int map = 0; map < kDerivatives; ++map) values[map] = loaded[map];
    });
    __syncthreads();
    float d[kDerivatives][kDown];
    filter_down<kDerivatives>(memory.across, d);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const int row = top + row_of(i);
      if (column >= images.width || row >= images.height) continue;
      const int at = row * images.width + column;
      const auto [x, y] = comparison.pair(at, channel);
      const float sign = x > y ? factors.l1 : x < y ? -factors.l1 : 0.0f;
      out.d_color[kChannels * at + channel] =
          comparison.weight(at) * fmaf(factors.ssim, d[0][i] + 2.0f * x * d[1][i] + y * d[2][i], sign);
    }
  }
}

// d_color, which is by the colours behind the exposure, becomes that by those before it; each block's part of the
// gradient by the exposure.
__global__ __launch_bounds__(kThreads) void expose_vjp_kernel(const float* color, Late<LossTarget> target,
                                                              int64_t n_pixels, float* d_color, float* d_exposure) {
  __shared__ float exposure[kExposureSize];
  if (threadIdx.x < kExposureSize) exposure[threadIdx.x] = target.place_or_value()->exposure[threadIdx.x];
  __syncthreads();
  float sums[kExposureSize] = {};
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < n_pixels; at += int64_t(gridDim.x) * kThreads) {
    const float* x = color + kChannels * at;
    float* out = d_color + kChannels * at;
    const float d[kChannels] = {out[0], out[1], out[2]};
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) sums[c * (kChannels + 1) + k] += d[c] * x[k];
      sums[c * (kChannels + 1) + kChannels] += d[c];
      out[c] = exposed_vjp(exposure, d, c);
    }
  }
#pragma unroll
  for (int i = 0; i < kExposureSize; ++i) {
    const double sum = block_sum(double(sums[i]));
    if (threadIdx.x == 0) d_exposure[i * kExposureBlocks + blockIdx.x] = float(sum);
  }
}

// The blocks' parts together, always in the same order: a warp for each number.
__global__ __launch_bounds__(32) void exposure_gradient_kernel(const float* parts, float* d_exposure) {
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < kExposureBlocks; i += 32) sum += double(parts[blockIdx.x * kExposureBlocks + i]);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, unsigned(step));
  if (threadIdx.x == 0) d_exposure[blockIdx.x] = float(sum);
}

}  // namespace

void queue_loss(cudaStream_t stream, const LossImages& images, const LateTarget& target, const LossSettings& settings,
                void* memory, const LossOutput& out) {
  const int64_t n_pixels = int64_t(images.width) * images.height;
  if (n_pixels * kChannels > INT32_MAX) throw std::invalid_argument("color: too many pixels for one loss");
  const dim3 grid(n_blocks_of(images.width, kWidth), n_blocks_of(images.height, kHeight));
  const int64_t n_blocks = int64_t(grid.x) * grid.y;
  Arena arena(memory);
  const LossScratch scratch = LossScratch::of(arena, images.width, images.height);
  const LossSums shares = {1.0 - double(settings.ssim_weight), -double(settings.ssim_weight)};
  if (!target.has_mask && !target.has_exposure && settings.padding == SsimPadding::kZero) {
    moments_kernel<true><<<grid, kThreads, 0, stream>>>(images, target.late, 0, scratch);
    const double n_values = double(n_pixels * kChannels);
    const LossFactors factors = {float(shares.l1 / n_values), float(shares.ssim / n_values)};
    gradient_kernel<true><<<grid, kThreads, 0, stream>>>(images, target.late, scratch, factors, out);
  } else {
    moments_kernel<false><<<grid, kThreads, 0, stream>>>(images, target.late, margin_of(settings.padding), scratch);
    weigh_kernel<<<1, kThreads, 0, stream>>>(scratch, n_blocks, shares, out.means);
    gradient_kernel<false><<<grid, kThreads, 0, stream>>>(images, target.late, scratch, {}, out);
  }
  if (target.has_exposure) {
    expose_vjp_kernel<<<kExposureBlocks, kThreads, 0, stream>>>(images.color, target.late, n_pixels, out.d_color,
                                                                scratch.d_exposure);
    exposure_gradient_kernel<<<kExposureSize, 32, 0, stream>>>(scratch.d_exposure, out.d_exposure);
  }
  check_launch("loss");
}

}  // namespace cuda

size_t loss_scratch(const Cuda&, int width, int height) {
  Arena arena(nullptr);
  cuda::LossScratch::of(arena, width, height);
  return arena.used();
}

void loss(const Cuda& backend, const LossImages& images, const LossSettings& settings, void* memory,
          const LossOutput& out) {
  cuda::queue_loss(stream_of(backend), images, cuda::LateTarget::of(images.target), settings, memory, out);
}

}  // namespace spaceport
