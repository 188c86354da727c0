// update: Adam over all rows, every moment at every step.
#include "adam.cuh"
#include "launch.cuh"
#include "sh_moments.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;

// One table of parameters with its gradient and moments, each [n].
struct Table {
  float* values;
  const float* gradient;
  float* first;
  float* second;
  int64_t n;
  float rate;
};

__global__ __launch_bounds__(kThreads) void update_kernel(Table t, AdamRates rates) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= t.n) return;
  adam(t.values[i], t.gradient[i], t.first[i], t.second[i], t.rate, rates);
}

template <class Sh>
__global__ __launch_bounds__(kThreads) void update_sh_kernel(Sh sh, const float* gradient, int64_t n_values,
                                                             int n_columns, AdamSettings a, AdamRates rates) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n_values) return;
  const int64_t row = i / n_columns;
  const int column = int(i - row * n_columns);
  Parameter<float> p = sh.load_one(row, n_columns, column);
  adam(p.value, gradient[i], p.first, p.second, column < 3 ? a.sh_dc : a.sh_rest, rates);
  sh.store_one(p, row, n_columns, column, {uint32_t(a.step)});
}

}  // namespace
}  // namespace cuda

void update(const Cuda& backend, const Gaussians& values, const Gaussians& gradient, const AdamMoments& moments,
            const AdamSettings& a) {
  const Gaussians &first = moments.first, &second = moments.second;
  const cuda::AdamRates rates = cuda::AdamRates::of(a);
  const int64_t n = values.n;
  const int n_columns = values.n_coefficients * 3;
  const cuda::Table tables[] = {
      {values.means, gradient.means, first.means, second.means, 3 * n, a.means},
      {values.log_scales, gradient.log_scales, first.log_scales, second.log_scales, 3 * n, a.log_scales},
      {values.quaternions, gradient.quaternions, first.quaternions, second.quaternions, 4 * n, a.quaternions},
      {values.opacities, gradient.opacities, first.opacities, second.opacities, n, a.opacities},
  };
  if (n == 0) return;
  for (const cuda::Table& table : tables) {
    cuda::update_kernel<<<n_blocks_of(table.n, cuda::kThreads), cuda::kThreads, 0, stream_of(backend)>>>(table, rates);
  }
  cuda::for_storage(values, moments, [&](const auto& sh) {
    const unsigned n_blocks = n_blocks_of(n * n_columns, cuda::kThreads);
    cuda::update_sh_kernel<<<n_blocks, cuda::kThreads, 0, stream_of(backend)>>>(sh, gradient.sh, n * n_columns,
                                                                                n_columns, a, rates);
  });
  check_launch("update");
}

}  // namespace spaceport
