// loss: L1 + D-SSIM and its gradient. Two passes over tiles of the image: the local moments, SSIM and its derivatives;
// then those derivatives filtered back onto the pixels. Windows are separable: across, then down.
#define SPACEPORT_ISA cuda

#include "launch.cuh"
#include "scalar.h"
#include "ssim_math.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kSide = 16;  // pixels along a block
constexpr int kThreads = kSide * kSide;
constexpr int kHalo = kSide + 2 * kRadius;
constexpr int kDerivatives = 3;

struct LossScratch {
  float* derivatives;  // [kDerivatives, kChannels, H, W]
  double2* sums;       // [n_blocks] of |difference| and of SSIM
  double2* total;

  static LossScratch of(Arena& arena, int width, int height, int64_t n_blocks) {
    return {arena.take<float>(int64_t(kDerivatives) * kChannels * width * height), arena.take<double2>(n_blocks),
            arena.take<double2>(1)};
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

// Filters `kPlanes` values of the block with its halo, made by value(plane, x, y), across and down. The result is that
// of the thread's own pixel.
template <int kPlanes, class Value>
__device__ void filtered(Value&& value, float (*across)[kHalo][kSide], float out[kPlanes]) {
  const int column = int(threadIdx.x) % kSide;
  for (int row = int(threadIdx.x) / kSide; row < kHalo; row += kSide) {
    float sums[kPlanes] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      float values[kPlanes];
      value(row, column + k, values);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) sums[plane] = fmaf(kWindow[k], values[plane], sums[plane]);
    }
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) across[plane][row][column] = sums[plane];
  }
  __syncthreads();
  const int own = int(threadIdx.x) / kSide;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    out[plane] = 0.0f;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) out[plane] = fmaf(kWindow[k], across[plane][own + k][column], out[plane]);
  }
}

__global__ __launch_bounds__(kThreads) void moments_kernel(LossImages images, LossScratch scratch) {
  __shared__ float x[kHalo][kHalo], y[kHalo][kHalo];
  __shared__ float across[5][kHalo][kSide];
  const int left = int(blockIdx.x) * kSide, top = int(blockIdx.y) * kSide;
  const int column = left + int(threadIdx.x) % kSide, row = top + int(threadIdx.x) / kSide;
  const bool is_inside = column < images.width && row < images.height;
  const int64_t n_pixels = int64_t(images.width) * images.height;
  double l1 = 0.0, ssim = 0.0;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < kHalo * kHalo; i += kThreads) {
      const int from_x = left + i % kHalo - kRadius, from_y = top + i / kHalo - kRadius;
      const bool exists = from_x >= 0 && from_x < images.width && from_y >= 0 && from_y < images.height;
      const int64_t at = kChannels * (int64_t(from_y) * images.width + from_x) + channel;
      x[i / kHalo][i % kHalo] = exists ? images.color[at] : 0.0f;
      y[i / kHalo][i % kHalo] = exists ? float(images.photo[at]) * (1.0f / 255.0f) : 0.0f;
    }
    __syncthreads();
    float moments[5];
    filtered<5>(
        [&](int r, int c, float* values) {
          const float a = x[r][c], b = y[r][c];
          values[0] = a;
          values[1] = b;
          values[2] = a * a;
          values[3] = b * b;
          values[4] = a * b;
        },
        across, moments);
    if (is_inside) {
      const SsimDerivatives<float> d = ssim_of(moments);
      ssim += double(d.ssim);
      l1 += double(fabsf(x[threadIdx.x / kSide + kRadius][threadIdx.x % kSide + kRadius] -
                         y[threadIdx.x / kSide + kRadius][threadIdx.x % kSide + kRadius]));
      float* to = scratch.derivatives + channel * n_pixels + int64_t(row) * images.width + column;
      to[0] = d.by_mean;
      to[kChannels * n_pixels] = d.by_square;
      to[2 * kChannels * n_pixels] = d.by_product;
    }
  }
  const double l1_sum = block_sum(l1), ssim_sum = block_sum(ssim);
  if (threadIdx.x == 0) {
    scratch.sums[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = make_double2(l1_sum, ssim_sum);
  }
}

__global__ __launch_bounds__(kThreads) void gradient_kernel(LossImages images, LossScratch scratch, float l1_factor,
                                                            float ssim_factor, float* d_color) {
  __shared__ float maps[kDerivatives][kHalo][kHalo];
  __shared__ float across[kDerivatives][kHalo][kSide];
  const int left = int(blockIdx.x) * kSide, top = int(blockIdx.y) * kSide;
  const int column = left + int(threadIdx.x) % kSide, row = top + int(threadIdx.x) / kSide;
  const int64_t n_pixels = int64_t(images.width) * images.height;
  for (int channel = 0; channel < kChannels; ++channel) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < kHalo * kHalo; i += kThreads) {
      const int from_x = left + i % kHalo - kRadius, from_y = top + i / kHalo - kRadius;
      const bool exists = from_x >= 0 && from_x < images.width && from_y >= 0 && from_y < images.height;
      const int64_t at = channel * n_pixels + int64_t(from_y) * images.width + from_x;
#pragma unroll
      for (int map = 0; map < kDerivatives; ++map) {
        maps[map][i / kHalo][i % kHalo] = exists ? scratch.derivatives[map * kChannels * n_pixels + at] : 0.0f;
      }
    }
    __syncthreads();
    float d[kDerivatives];
    filtered<kDerivatives>(
        [&](int r, int c, float* values) {
#pragma unroll
          for (int map = 0; map < kDerivatives; ++map) values[map] = maps[map][r][c];
        },
        across, d);
    if (column < images.width && row < images.height) {
      const int64_t at = kChannels * (int64_t(row) * images.width + column) + channel;
      const float x = images.color[at], y = float(images.photo[at]) * (1.0f / 255.0f);
      const float sign = x > y ? l1_factor : x < y ? -l1_factor : 0.0f;
      d_color[at] = fmaf(ssim_factor, d[0] + 2.0f * x * d[1] + y * d[2], sign);
    }
  }
}

// One block: the blocks' sums, always in the same order.
__global__ __launch_bounds__(kThreads) void total_kernel(const double2* sums, int64_t n, double2* total) {
  double l1 = 0.0, ssim = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    l1 += sums[i].x;
    ssim += sums[i].y;
  }
  const double l1_sum = block_sum(l1), ssim_sum = block_sum(ssim);
  if (threadIdx.x == 0) *total = make_double2(l1_sum, ssim_sum);
}

}  // namespace
}  // namespace cuda

size_t loss_scratch(const Cuda&, int width, int height) {
  const dim3 grid = cuda::grid_of(width, height);
  Arena arena(nullptr);
  cuda::LossScratch::of(arena, width, height, int64_t(grid.x) * grid.y);
  return arena.used();
}

LossValue loss(const Cuda& backend, const LossImages& images, const LossSettings& settings, void* memory,
               float* d_color) {
  const cudaStream_t stream = stream_of(backend);
  const dim3 grid = cuda::grid_of(images.width, images.height);
  const int64_t n_blocks = int64_t(grid.x) * grid.y;
  Arena arena(memory);
  const cuda::LossScratch scratch = cuda::LossScratch::of(arena, images.width, images.height, n_blocks);
  const double n_values = double(images.width) * double(images.height) * cuda::kChannels;
  cuda::moments_kernel<<<grid, cuda::kThreads, 0, stream>>>(images, scratch);
  cuda::gradient_kernel<<<grid, cuda::kThreads, 0, stream>>>(images, scratch,
                                                             float((1.0 - double(settings.ssim_weight)) / n_values),
                                                             float(-double(settings.ssim_weight) / n_values), d_color);
  cuda::total_kernel<<<1, cuda::kThreads, 0, stream>>>(scratch.sums, n_blocks, scratch.total);
  check_launch("loss");
  double2 total;
  check(cudaMemcpyAsync(&total, scratch.total, sizeof(total), cudaMemcpyDeviceToHost, stream), "loss");
  check(cudaStreamSynchronize(stream), "loss");
  return {total.x / n_values, total.y / n_values};
}

}  // namespace spaceport
