// density: what densification needs to know of every Gaussian, gathered step by step.
#include "launch.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void density_kernel(Projected projected, const float* d_splats, float half_width,
                                                           float half_height, DensityStatistics out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= projected.n) return;
  const int32_t row = projected.gaussian_from_splat[i];
  const float* d = d_splats + i * kSplatGradientStride;
  out.gradient_sums[row] += hypotf(d[0] * half_width, d[1] * half_height);
  out.n_visible[row] += 1.0f;
}

}  // namespace
}  // namespace cuda

void density(const Cuda& backend, const Projected& projected, const float* d_splats, const Camera& camera,
             const DensityStatistics& out) {
  if (projected.n == 0) return;
  cuda::density_kernel<<<n_blocks_of(projected.n, cuda::kThreads), cuda::kThreads, 0, stream_of(backend)>>>(
      projected, d_splats, 0.5f * float(camera.width), 0.5f * float(camera.height), out);
  check_launch("density");
}

}  // namespace spaceport
