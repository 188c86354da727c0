// loss: L1 + D-SSIM and its gradient. Two passes over blocks of the image: the local moments, SSIM and its derivatives;
// then those derivatives filtered back onto the pixels. Windows are separable; a thread filters eight pixels of a row
// at once, then six of a column, so that what it loads serves several of them.
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
// Rows are padded such that the lanes of a warp read and write different banks, and so that four at a time can be read.
constexpr int kRowLength = (kHaloWidth + 3) / 4 * 4;
using Plane = float[kHaloHeight][kRowLength];
using FilteredPlane = float[kHaloHeight][kWidth + 1];

struct LossScratch {
  float* derivatives;  // [kDerivatives, kChannels, H, W]
  double2* sums;       // [n_blocks] of |difference| and of SSIM

  static LossScratch of(Arena& arena, int width, int height, int64_t n_blocks) {
    return {arena.take<float>(int64_t(kDerivatives) * kChannels * width * height), arena.take<double2>(n_blocks)};
  }
};

dim3 grid_of(int width, int height) {
  return dim3(n_blocks_of(width, kWidth), n_blocks_of(height, kHeight));
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

// Filters `kPlanes` quantities across: value(loaded, values) makes them of what the `kLoaded` planes hold at one place.
template <int kPlanes, int kLoaded, class Value>
__device__ void filter_across(const Plane* planes, Value&& value, FilteredPlane* across) {
  for (int task = int(threadIdx.x); task < kHaloHeight * (kWidth / kAcross); task += kThreads) {
    const int row = task / (kWidth / kAcross), first = task % (kWidth / kAcross) * kAcross;
    float sums[kPlanes][kAcross] = {};
    float4 fours[kLoaded];
#pragma unroll
    for (int i = 0; i < kAcross + kTaps - 1; ++i) {
      float loaded[kLoaded], values[kPlanes];
#pragma unroll
      for (int plane = 0; plane < kLoaded; ++plane) {
        if (i % 4 == 0) fours[plane] = *reinterpret_cast<const float4*>(&planes[plane][row][first + i]);
        const float4& four = fours[plane];
        loaded[plane] = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
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
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int pixel = 0; pixel < kAcross; ++pixel) across[plane][row][first + pixel] = sums[plane][pixel];
    }
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

// Fills planes with the block's pixels and their halo: fetch(place in the image, values) reads a pixel; outside it all
// is zero. Several are read before any is written, so that the block does not wait for memory at each.
template <int kPlanes, class Fetch>
__device__ void load_with_halo(int width, int height, Fetch&& fetch, Plane* planes) {
  constexpr int kPixels = kHaloHeight * kHaloWidth, kAtOnce = 6;
  const int left = int(blockIdx.x) * kWidth - kRadius, top = int(blockIdx.y) * kHeight - kRadius;
  for (int begin = int(threadIdx.x); begin < kPixels; begin += kAtOnce * kThreads) {
    float values[kAtOnce][kPlanes] = {};
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
      for (int plane = 0; plane < kPlanes; ++plane) planes[plane][row][i - row * kHaloWidth] = values[j][plane];
    }
  }
}

__device__ float shade_of(uint8_t level) {
  return float(level) * (1.0f / 255.0f);
}

__global__ __launch_bounds__(kThreads, 5) void moments_kernel(LossImages images, Late<const uint8_t*> late_photo,
                                                              LossScratch scratch) {
  __shared__ __align__(16) Plane planes[2];
  Plane &x = planes[0], &y = planes[1];
  __shared__ FilteredPlane across[kMoments];
  const uint8_t* photo = late_photo.get();
  const int column = int(blockIdx.x) * kWidth + column_of(), top = int(blockIdx.y) * kHeight;
  const int64_t n_pixels = int64_t(images.width) * images.height;
  float l1 = 0.0f, ssim = 0.0f;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    load_with_halo<2>(
        images.width, images.height,
        [&](int at, float* values) {
          values[0] = images.color[kChannels * at + channel];
          values[1] = shade_of(photo[kChannels * at + channel]);
        },
        planes);
    __syncthreads();
    filter_across<kMoments, 2>(  // E[x^2] and E[y^2] are only ever needed as their sum
        planes,
        [](const float* loaded, float* values) {
          values[0] = loaded[0];
          values[1] = loaded[1];
          values[2] = fmaf(loaded[0], loaded[0], loaded[1] * loaded[1]);
          values[3] = loaded[0] * loaded[1];
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

__global__ __launch_bounds__(kThreads, 4) void gradient_kernel(LossImages images, Late<const uint8_t*> late_photo,
                                                               LossScratch scratch, float l1_factor, float ssim_factor,
                                                               LossOutput out) {
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    write_means(scratch, int64_t(gridDim.x) * gridDim.y, double(images.width) * images.height * kChannels, out.means);
  }
  const uint8_t* photo = late_photo.get();
  __shared__ __align__(16) Plane maps[kDerivatives];
  __shared__ FilteredPlane across[kDerivatives];
  const int column = int(blockIdx.x) * kWidth + column_of(), top = int(blockIdx.y) * kHeight;
  const int64_t n_pixels = int64_t(images.width) * images.height;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    const float* from = scratch.derivatives + channel * n_pixels;
    load_with_halo<kDerivatives>(
        images.width, images.height,
        [&](int at, float* values) {
#pragma unroll
          for (int map = 0; map < kDerivatives; ++map) values[map] = from[map * kChannels * n_pixels + at];
        },
        maps);
    __syncthreads();
    filter_across<kDerivatives, kDerivatives>(
        maps,
        [](const float* loaded, float* values) {
#pragma unroll
          for (int map = 0; map < kDerivatives; ++map) values[map] = loaded[map];
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
  if (int64_t(images.width) * images.height * kChannels > INT32_MAX) {
    throw std::invalid_argument("color: too many pixels for one loss");
  }
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
