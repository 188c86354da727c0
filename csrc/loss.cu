// loss: L1 + D-SSIM and its gradient. Two passes over blocks of the image: the local moments, SSIM and its derivatives;
// then those derivatives filtered back onto the pixels. Windows are separable; a thread filters eight pixels of a row
// at once, then four of a column, so that what it loads serves several of them.
#define SPACEPORT_ISA cuda

#include "queued.cuh"
#include "ssim_math.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kSide = 32;  // pixels along a block
constexpr int kThreads = 256;
constexpr int kHalo = kSide + 2 * kRadius;
constexpr int kAcross = 8, kDown = 4;  // pixels that a thread filters at once
constexpr int kMoments = 4, kDerivatives = 3;
static_assert(kSide * kSide == kThreads * kDown, "one pass down covers the block");
// Rows padded such that the lanes of a warp read and write different banks.
using Plane = float[kHalo][kHalo + 2];  // a multiple of four
using FilteredPlane = float[kHalo][kSide + 1];

struct LossScratch {
  float* derivatives;  // [kDerivatives, kChannels, H, W]
  double2* sums;       // [n_blocks] of |difference| and of SSIM

  static LossScratch of(Arena& arena, int width, int height, int64_t n_blocks) {
    return {arena.take<float>(int64_t(kDerivatives) * kChannels * width * height), arena.take<double2>(n_blocks)};
  }
};

dim3 grid_of(int width, int height) {
  return dim3(n_blocks_of(width, kSide), n_blocks_of(height, kSide));
}

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

// Filters `kPlanes` quantities, made by value(row, column, values) for each pixel of the block with its halo, across.
template <int kPlanes, class Value>
__device__ void filter_across(Value&& value, FilteredPlane* across) {
  for (int task = int(threadIdx.x); task < kHalo * (kSide / kAcross); task += kThreads) {
    const int row = task / (kSide / kAcross), first = task % (kSide / kAcross) * kAcross;
    float sums[kPlanes][kAcross] = {};
#pragma unroll
    for (int i = 0; i < kAcross + kTaps - 1; ++i) {
      float values[kPlanes];
      value(row, first + i, values);
#pragma unroll
      for (int pixel = 0; pixel < kAcross; ++pixel) {
        if (i - pixel < 0 || i - pixel >= kTaps) continue;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          sums[plane][pixel] = fmaf(kWindow[i - pixel], values[plane], sums[plane][pixel]);
        }
      }
    }
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int pixel = 0; pixel < kAcross; ++pixel) across[plane][row][first + pixel] = sums[plane][pixel];
    }
  }
}

// And down: out[plane][i] is that of the thread's pixel `column_of()`, `row_of(i)`.
__device__ int column_of() {
  return int(threadIdx.x) % kSide;
}
__device__ int row_of(int i) {
  return int(threadIdx.x) / kSide * kDown + i;
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

// Calls load(row, column of the block with its halo, place in the image, whether it lies inside) for every pixel of
// these.
template <class Load>
__device__ void for_each_with_halo(int width, int height, Load&& load) {
  const int left = int(blockIdx.x) * kSide - kRadius, top = int(blockIdx.y) * kSide - kRadius;
  for (int i = int(threadIdx.x); i < kHalo * kHalo; i += kThreads) {
    const int x = left + i % kHalo, y = top + i / kHalo;
    load(i / kHalo, i % kHalo, int64_t(y) * width + x, x >= 0 && x < width && y >= 0 && y < height);
  }
}

__device__ float shade_of(uint8_t level) {
  return float(level) * (1.0f / 255.0f);
}

__global__ __launch_bounds__(kThreads) void moments_kernel(LossImages images, Late<const uint8_t*> late_photo,
                                                           LossScratch scratch) {
  __shared__ Plane x, y;
  __shared__ FilteredPlane across[kMoments];
  const uint8_t* photo = late_photo.get();
  const int column = int(blockIdx.x) * kSide + column_of(), top = int(blockIdx.y) * kSide;
  const int64_t n_pixels = int64_t(images.width) * images.height;
  float l1 = 0.0f, ssim = 0.0f;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    for_each_with_halo(images.width, images.height, [&](int r, int c, int64_t at, bool exists) {
      x[r][c] = exists ? images.color[kChannels * at + channel] : 0.0f;
      y[r][c] = exists ? shade_of(photo[kChannels * at + channel]) : 0.0f;
    });
    __syncthreads();
    filter_across<kMoments>(  // E[x^2] and E[y^2] are only ever needed as their sum
        [&](int r, int c, float* values) {
          const float a = x[r][c], b = y[r][c];
          values[0] = a;
          values[1] = b;
          values[2] = fmaf(a, a, b * b);
          values[3] = a * b;
        },
        across);
    __syncthreads();
    float moments[kMoments][kDown];
    filter_down<kMoments>(across, moments);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const int row = top + row_of(i);
      if (column >= images.width || row >= images.height) continue;
      const float own[5] = {moments[0][i], moments[1][i], moments[2][i], 0.0f, moments[3][i]};
      const SsimDerivatives<float> d = ssim_of(own);
      ssim += d.ssim;
      l1 += fabsf(x[row_of(i) + kRadius][column_of() + kRadius] - y[row_of(i) + kRadius][column_of() + kRadius]);
      float* to = scratch.derivatives + channel * n_pixels + int64_t(row) * images.width + column;
      to[0] = d.by_mean;
      to[kChannels * n_pixels] = d.by_square;
      to[2 * kChannels * n_pixels] = d.by_product;
    }
  }
  const double l1_sum = block_sum(double(l1)), ssim_sum = block_sum(double(ssim));
  if (threadIdx.x == 0) {
    scratch.sums[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = make_double2(l1_sum, ssim_sum);
  }
}

// The blocks' sums, always in the same order; called by a whole block.
__device__ void write_means(const LossScratch& scratch, int64_t n_sums, double n_values, double* means) {
  double l1 = 0.0, ssim = 0.0;
  for (int64_t i = threadIdx.x; i < n_sums; i += kThreads) {
    l1 += scratch.sums[i].x;
    ssim += scratch.sums[i].y;
  }
  const double l1_sum = block_sum(l1), ssim_sum = block_sum(ssim);
  if (threadIdx.x == 0) {
    means[0] = l1_sum / n_values;
    means[1] = ssim_sum / n_values;
  }
}

__global__ __launch_bounds__(kThreads) void gradient_kernel(LossImages images, Late<const uint8_t*> late_photo,
                                                            LossScratch scratch, float l1_factor, float ssim_factor,
                                                            LossOutput out) {
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    write_means(scratch, int64_t(gridDim.x) * gridDim.y, double(images.width) * images.height * kChannels, out.means);
  }
  const uint8_t* photo = late_photo.get();
  __shared__ Plane maps[kDerivatives];
  __shared__ FilteredPlane across[kDerivatives];
  const int column = int(blockIdx.x) * kSide + column_of(), top = int(blockIdx.y) * kSide;
  const int64_t n_pixels = int64_t(images.width) * images.height;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    for_each_with_halo(images.width, images.height, [&](int r, int c, int64_t at, bool exists) {
      const float* from = scratch.derivatives + channel * n_pixels + at;
#pragma unroll
      for (int map = 0; map < kDerivatives; ++map) maps[map][r][c] = exists ? from[map * kChannels * n_pixels] : 0.0f;
    });
    __syncthreads();
    filter_across<kDerivatives>(
        [&](int r, int c, float* values) {
#pragma unroll
          for (int map = 0; map < kDerivatives; ++map) values[map] = maps[map][r][c];
        },
        across);
    __syncthreads();
    float d[kDerivatives][kDown];
    filter_down<kDerivatives>(across, d);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const int row = top + row_of(i);
      if (column >= images.width || row >= images.height) continue;
      const int64_t at = kChannels * (int64_t(row) * images.width + column) + channel;
      const float x = images.color[at], y = shade_of(photo[at]);
      const float sign = x > y ? l1_factor : x < y ? -l1_factor : 0.0f;
      out.d_color[at] = fmaf(ssim_factor, d[0][i] + 2.0f * x * d[1][i] + y * d[2][i], sign);
    }
  }
}

}  // namespace

void queue_loss(cudaStream_t stream, const LossImages& images, const Late<const uint8_t*>& photo,
                const LossSettings& settings, void* memory, const LossOutput& out) {
  const dim3 grid = grid_of(images.width, images.height);
  Arena arena(memory);
  const LossScratch scratch = LossScratch::of(arena, images.width, images.height, int64_t(grid.x) * grid.y);
  const double n_values = double(images.width) * double(images.height) * kChannels;
  moments_kernel<<<grid, kThreads, 0, stream>>>(images, photo, scratch);
  gradient_kernel<<<grid, kThreads, 0, stream>>>(images, photo, scratch,
                                                 float((1.0 - double(settings.ssim_weight)) / n_values),
                                                 float(-double(settings.ssim_weight) / n_values), out);
  check_launch("loss");
}

}  // namespace cuda

size_t loss_scratch(const Cuda&, int width, int height) {
  const dim3 grid = cuda::grid_of(width, height);
  Arena arena(nullptr);
  cuda::LossScratch::of(arena, width, height, int64_t(grid.x) * grid.y);
  return arena.used();
}

void loss(const Cuda& backend, const LossImages& images, const LossSettings& settings, void* memory,
          const LossOutput& out) {
  cuda::queue_loss(stream_of(backend), images, cuda::Late<const uint8_t*>(images.photo), settings, memory, out);
}

}  // namespace spaceport
