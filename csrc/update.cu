// update: Adam over all rows, every moment at every step.
#include "adam.cuh"
#include "launch.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;

// One table of parameters with its gradient and moments, each [n]. Of every `period` values the first `n_leading` have
// the leading learning rate.
struct Table {
  float* values;
  const float* gradient;
  float* first;
  float* second;
  int64_t n;
  float leading_rate, rate;
  int n_leading, period;
};

__global__ __launch_bounds__(kThreads) void update_kernel(Table t, AdamRates rates) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= t.n) return;
  const float rate = t.n_leading > 0 && i % t.period < t.n_leading ? t.leading_rate : t.rate;
  adam(t.values[i], t.gradient[i], t.first[i], t.second[i], rate, rates);
}

}  // namespace
}  // namespace cuda

void update(const Cuda& backend, const Gaussians& values, const Gaussians& gradient, const Gaussians& first,
            const Gaussians& second, const AdamSettings& a) {
  const cuda::AdamRates rates = cuda::AdamRates::of(a);
  const int64_t n = values.n;
  const int sh = values.n_coefficients * 3;
  const cuda::Table tables[] = {
      {values.means, gradient.means, first.means, second.means, 3 * n, a.means, a.means, 0, 1},
      {values.log_scales, gradient.log_scales, first.log_scales, second.log_scales, 3 * n, a.log_scales, a.log_scales,
       0, 1},
      {values.quaternions, gradient.quaternions, first.quaternions, second.quaternions, 4 * n, a.quaternions,
       a.quaternions, 0, 1},
      {values.opacities, gradient.opacities, first.opacities, second.opacities, n, a.opacities, a.opacities, 0, 1},
      {values.sh, gradient.sh, first.sh, second.sh, n * sh, a.sh_dc, a.sh_rest, 3, sh},
  };
  if (n == 0) return;
  for (const cuda::Table& table : tables) {
    cuda::update_kernel<<<n_blocks_of(table.n, cuda::kThreads), cuda::kThreads, 0, stream_of(backend)>>>(table, rates);
  }
  check_launch("update");
}

}  // namespace spaceport
