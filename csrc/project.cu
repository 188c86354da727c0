// project: raw parameters to splats on the image plane, one thread a Gaussian.
//
// Visible ones are written in the order of their rows in one pass over them: every block learns from the blocks before
// it where its own begin (decoupled look-back, Merrill and Garland 2016). Compiled without fused multiply-adds, as
// tile.cu is: both count the tiles of a splat, and must agree.
#define SPACEPORT_ISA cuda

#include "adam.cuh"
#include "launch.cuh"
#include "scalar.h"
#include "splat_math.h"
#include "tile_spans.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What the blocks tell each other: zero while nothing is known, then a count with a mark above it.
constexpr uint64_t kOwnCount = uint64_t(1) << 62;  // of the block alone
constexpr uint64_t kSumSoFar = uint64_t(2) << 62;  // of the block and all before it
constexpr uint64_t kCountBits = kOwnCount - 1;

struct LookBack {
  uint64_t* splats;     // [n_blocks]
  uint64_t* instances;  // [n_blocks]
  unsigned* ticket;  // blocks take numbers in the order in which they start, so that nobody waits for one not running

  static LookBack of(Arena& arena, int64_t n_blocks) {
    return {arena.take<uint64_t>(n_blocks), arena.take<uint64_t>(n_blocks), arena.take<unsigned>(1)};
  }
};

// Called by one whole warp: publishes the block's count and returns the sum of the counts of all blocks before it.
__device__ uint64_t sum_before(uint64_t* state, int64_t block, uint64_t own) {
  volatile uint64_t* shared_state = state;
  const int lane = int(threadIdx.x % 32);
  if (block == 0) {
    if (lane == 0) shared_state[0] = kSumSoFar | own;
    return 0;
  }
  if (lane == 0) shared_state[block] = kOwnCount | own;
  uint64_t sum = 0;
  for (int64_t last = block - 1;; last -= 32) {
    const int64_t mine = last - lane;
    uint64_t word = kSumSoFar;  // before the first block there is nothing
    if (mine >= 0) {
      do {
        word = shared_state[mine];
      } while (word == 0);
    }
    const unsigned ends = __ballot_sync(kAllLanes, (word & kSumSoFar) != 0);
    const int n_used = ends == 0 ? 32 : __ffs(int(ends));  // up to the nearest block that knows its sum
    uint64_t part = lane < n_used ? word & kCountBits : 0;
    for (int step = 16; step > 0; step /= 2) part += __shfl_xor_sync(kAllLanes, part, step);
    sum += part;
    if (ends != 0) break;
  }
  if (lane == 0) shared_state[block] = kSumSoFar | (sum + own);
  return sum;
}

// Sums over the threads of the block before this one, of two counts at once, and the block's totals.
struct BlockSums {
  int splats_before, n_splats;
  uint64_t instances_before, n_instances;
};
__device__ BlockSums block_sums(int n_splats, uint64_t n_instances) {
  __shared__ int warp_splats[kWarps];
  __shared__ uint64_t warp_instances[kWarps];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  int splats = n_splats;
  uint64_t instances = n_instances;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, splats, unsigned(step));
    const uint64_t instances_below = __shfl_up_sync(kAllLanes, instances, unsigned(step));
    if (lane >= step) {
      splats += below;
      instances += instances_below;
    }
  }
  if (lane == 31) {
    warp_splats[warp] = splats;
    warp_instances[warp] = instances;
  }
  __syncthreads();
  BlockSums sums = {splats - n_splats, 0, instances - n_instances, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) {
      sums.splats_before += warp_splats[w];
      sums.instances_before += warp_instances[w];
    }
    sums.n_splats += warp_splats[w];
    sums.n_instances += warp_instances[w];
  }
  return sums;
}

__device__ Vec3<float> load3(const float* table, int64_t row) {
  return {table[3 * row], table[3 * row + 1], table[3 * row + 2]};
}
__device__ void store3(float* table, int64_t row, const Vec3<float>& value) {
  table[3 * row] = value.x;
  table[3 * row + 1] = value.y;
  table[3 * row + 2] = value.z;
}
__device__ RawShape<float> raw_shape_of(const Gaussians& g, int64_t row) {
  const float4 q = reinterpret_cast<const float4*>(g.quaternions)[row];
  return {load3(g.means, row), load3(g.log_scales, row), {q.x, q.y, q.z, q.w}};
}

// The first `kColumns` floats of a row of SH coefficients; rows that are a multiple of 16 bytes long come 16 at a time.
template <int kColumns>
__device__ void load_sh(const float* sh, int64_t row, int stride, float* columns) {
  const float* from = sh + row * stride;
  if (kColumns % 4 == 0 && stride % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      columns[4 * i] = four.x;
      columns[4 * i + 1] = four.y;
      columns[4 * i + 2] = four.z;
      columns[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns[i] = from[i];
  }
}
template <int kColumns>
__device__ void store_sh(float* sh, int64_t row, int stride, const float* columns) {
  float* to = sh + row * stride;
  if (kColumns % 4 == 0 && stride % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      reinterpret_cast<float4*>(to)[i] =
          make_float4(columns[4 * i], columns[4 * i + 1], columns[4 * i + 2], columns[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) to[i] = columns[i];
  }
}

struct Grid {
  int tiles_x, tiles_y;
};

// The splat of a row and how many tiles it touches; zero where it is not visible.
template <int kDegree>
__device__ uint64_t project_row(const Gaussians& g, int64_t row, const View<float>& view,
                                const RasterSettings& settings, const Grid& grid, Splat& splat) {
  const float logit = g.opacities[row], opacity = sigmoid(logit);
  const Vec3<float> mean = load3(g.means, row);
  if (!(point_in_cam(view, mean).z >= settings.near) || !(opacity >= kAlphaCutoff)) return 0;
  const RawShape<float> raw = raw_shape_of(g, row);
  const Shape<float> s = shape_of(raw, view, settings.low_pass);
  if (!(norm_squared(raw.quaternion) >= kMinQuaternionNormSquared) || !(s.determinant > 0.0f)) return 0;
  const float level = ellipse_level(opacity);
  splat = {s.x,
           s.y,
           s.conic.a,
           s.conic.b,
           s.conic.c,
           opacity,
           0.0f,
           0.0f,
           0.0f,
           s.point.z,
           sqrtf(level * s.covariance.xx),
           sqrtf(level * s.covariance.yy)};
  uint64_t n_tiles = 0;
  for_each_tile_row(splat, grid.tiles_x, grid.tiles_y,
                    [&](int, TileSpan columns) { n_tiles += uint64_t(columns.end - columns.begin); });
  if (n_tiles == 0) return 0;
  float basis[kMaxShCoefficients], sh[3 * n_coefficients_of(kDegree)];
  sh_basis(kDegree, direction(mean - view.center), basis);
  load_sh<3 * n_coefficients_of(kDegree)>(g.sh, row, 3 * g.n_coefficients, sh);
  const Vec3<float> color = color_of(kDegree, basis, sh);
  if (!(doubt_of(s, color, opacity, logit) == 0.0f)) return 0;
  splat.red = fmaxf(color.x, 0.0f);
  splat.green = fmaxf(color.y, 0.0f);
  splat.blue = fmaxf(color.z, 0.0f);
  return n_tiles;
}

template <int kDegree>
__global__ __launch_bounds__(kThreads) void project_kernel(Gaussians g, View<float> view, RasterSettings settings,
                                                           Grid grid, LookBack look_back, Projected out,
                                                           ProjectedCounts* counts) {
  __shared__ int64_t block, first_splat, first_instance;
  if (threadIdx.x == 0) block = atomicAdd(look_back.ticket, 1u);
  __syncthreads();
  const int64_t row = block * kThreads + threadIdx.x;
  Splat splat;
  const uint64_t n_tiles = row < g.n ? project_row<kDegree>(g, row, view, settings, grid, splat) : 0;
  const BlockSums sums = block_sums(n_tiles > 0, n_tiles);
  if (threadIdx.x < 32) {
    const uint64_t before = sum_before(look_back.splats, block, uint64_t(sums.n_splats));
    const uint64_t instances_before = sum_before(look_back.instances, block, sums.n_instances);
    if (threadIdx.x == 0) {
      first_splat = int64_t(before);
      first_instance = int64_t(instances_before);
      if (block == gridDim.x - 1) {
        *counts = {first_splat + sums.n_splats, first_instance + int64_t(sums.n_instances)};
        out.instance_offsets[counts->n_splats] = counts->n_instances;
      }
    }
  }
  __syncthreads();
  if (n_tiles == 0) return;
  const int64_t at = first_splat + sums.splats_before;
  float4* to = reinterpret_cast<float4*>(out.splats + at);
  to[0] = make_float4(splat.x, splat.y, splat.a, splat.b);
  to[1] = make_float4(splat.c, splat.opacity, splat.red, splat.green);
  to[2] = make_float4(splat.blue, splat.depth, splat.extent_x, splat.extent_y);
  out.gaussian_from_splat[at] = int32_t(row);
  out.instance_offsets[at] = first_instance + int64_t(sums.instances_before);
}

template <int kDegree>
__global__ __launch_bounds__(kThreads) void project_vjp_kernel(Gaussians g, View<float> view, RasterSettings settings,
                                                               Projected projected, const float* d_splats,
                                                               Gaussians d_g) {
  const int64_t splat = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (splat >= projected.n) return;
  const int64_t row = projected.gaussian_from_splat[splat];
  const float* d = d_splats + splat * kSplatGradientStride;
  const RawShape<float> raw = raw_shape_of(g, row);
  const Shape<float> s = shape_of(raw, view, settings.low_pass);
  const RawShape<float> d_raw = shape_of_vjp(raw, view, s, d[0], d[1], Conic<float>{d[2], d[3], d[4]});
  const float opacity = sigmoid(g.opacities[row]);

  constexpr int kColumns = 3 * n_coefficients_of(kDegree);
  float basis[kMaxShCoefficients], d_basis[kMaxShCoefficients], sh[kColumns];
  const Vec3<float> offset = raw.mean - view.center;
  const Vec3<float> to_gaussian = direction(offset);
  sh_basis(kDegree, to_gaussian, basis);
  load_sh<kColumns>(g.sh, row, 3 * g.n_coefficients, sh);
  const Vec3<float> color = color_of(kDegree, basis, sh);
  const Vec3<float> d_color = {color.x > 0.0f ? d[6] : 0.0f, color.y > 0.0f ? d[7] : 0.0f,
                               color.z > 0.0f ? d[8] : 0.0f};
  color_of_vjp(kDegree, basis, d_color, sh, d_basis);
  store_sh<kColumns>(d_g.sh, row, 3 * g.n_coefficients, sh);

  store3(d_g.means, row, d_raw.mean + direction_vjp(offset, sh_basis_vjp(kDegree, to_gaussian, d_basis)));
  store3(d_g.log_scales, row, d_raw.log_scale);
  const Quaternion<float>& q = d_raw.quaternion;
  reinterpret_cast<float4*>(d_g.quaternions)[row] = make_float4(q.w, q.x, q.y, q.z);
  d_g.opacities[row] = d[5] * opacity * (1.0f - opacity);
}

constexpr int kFusedThreads = 128;  // rows of a block of the fused backward pass

// Row of the first splat whose Gaussian is not before `gaussian`.
__device__ int64_t first_splat_from(const Projected& projected, int64_t gaussian) {
  int64_t low = 0, high = projected.n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (projected.gaussian_from_splat[middle] < gaussian) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Which splat each of the block's rows is, or -1 where it is not visible.
__device__ int64_t splat_of_row(const Projected& projected, int64_t first_row) {
  __shared__ int64_t splats[kFusedThreads];
  __shared__ int64_t begin;
  splats[threadIdx.x] = -1;
  if (threadIdx.x == 0) begin = first_splat_from(projected, first_row);
  __syncthreads();
  const int64_t splat = begin + threadIdx.x;
  if (splat < projected.n) {
    const int64_t row = projected.gaussian_from_splat[splat] - first_row;
    if (row < kFusedThreads) splats[row] = splat;
  }
  __syncthreads();
  return splats[threadIdx.x];
}

// Gradient by the values of the basis: for each the product of its coefficients with the gradient by the colour.
template <int kDegree>
__device__ void basis_gradient(const float* sh, int stride, const float d_color[3], float d_basis[kMaxShCoefficients]) {
  constexpr int kColumns = 3 * n_coefficients_of(kDegree);
#pragma unroll
  for (int k = 0; k < n_coefficients_of(kDegree); ++k) d_basis[k] = 0.0f;
  const auto add = [&](int column, float value) {
    d_basis[column / 3] = fmaf(value, d_color[column % 3], d_basis[column / 3]);
  };
  if (stride % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(sh)[i];
      add(4 * i, four.x);
      add(4 * i + 1, four.y);
      add(4 * i + 2, four.z);
      add(4 * i + 3, four.w);
    }
#pragma unroll
    for (int i = kColumns / 4 * 4; i < kColumns; ++i) add(i, sh[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) add(i, sh[i]);
  }
}

__device__ void adam3(float* values, float* first, float* second, int64_t row, const Vec3<float>& gradient, float rate,
                      const AdamRates& rates) {
  const float g[3] = {gradient.x, gradient.y, gradient.z};
#pragma unroll
  for (int i = 0; i < 3; ++i) adam(values[3 * row + i], g[i], first[3 * row + i], second[3 * row + i], rate, rates);
}

__device__ void adam4(float* values, float* first, float* second, int64_t at, const float4& gradient,
                      const float4& rate, const AdamRates& rates) {
  float4 value = reinterpret_cast<float4*>(values)[at];
  float4 m = reinterpret_cast<float4*>(first)[at], v = reinterpret_cast<float4*>(second)[at];
  adam(value.x, gradient.x, m.x, v.x, rate.x, rates);
  adam(value.y, gradient.y, m.y, v.y, rate.y, rates);
  adam(value.z, gradient.z, m.z, v.z, rate.z, rates);
  adam(value.w, gradient.w, m.w, v.w, rate.w, rates);
  reinterpret_cast<float4*>(values)[at] = value;
  reinterpret_cast<float4*>(first)[at] = m;
  reinterpret_cast<float4*>(second)[at] = v;
}

struct FusedUpdate {
  AdamMoments moments;
  AdamSettings settings;
  AdamRates rates;
};

// A thread takes a row's place and shape; then all take the block's SH coefficients, which lie one behind the other,
// four at a time: their gradient is the product of a basis value and of the gradient by a colour.
template <int kDegree>
__global__ __launch_bounds__(kFusedThreads) void project_vjp_update_kernel(Gaussians g, View<float> view,
                                                                           RasterSettings settings, Projected projected,
                                                                           const float* d_splats, FusedUpdate u) {
  constexpr int kCoefficients = n_coefficients_of(kDegree);
  __shared__ float bases[kCoefficients][kFusedThreads + 1];
  __shared__ float d_colors[3][kFusedThreads + 1];
  const int64_t first_row = int64_t(blockIdx.x) * kFusedThreads, row = first_row + threadIdx.x;
  const int stride = 3 * g.n_coefficients;
  const int64_t splat = splat_of_row(projected, first_row);
  const Gaussians &first = u.moments.first, &second = u.moments.second;
  float basis[kMaxShCoefficients] = {}, d_color[3] = {};
  if (row < g.n) {
    RawShape<float> d_raw = {};
    float d_opacity = 0.0f;
    if (splat >= 0) {
      const float* d = d_splats + splat * kSplatGradientStride;
      const Splat& seen = projected.splats[splat];
      const RawShape<float> raw = raw_shape_of(g, row);
      const Shape<float> s = shape_of(raw, view, settings.low_pass);
      d_raw = shape_of_vjp(raw, view, s, d[0], d[1], Conic<float>{d[2], d[3], d[4]});
      d_opacity = d[5] * seen.opacity * (1.0f - seen.opacity);
      d_color[0] = seen.red > 0.0f ? d[6] : 0.0f;
      d_color[1] = seen.green > 0.0f ? d[7] : 0.0f;
      d_color[2] = seen.blue > 0.0f ? d[8] : 0.0f;
      const Vec3<float> offset = raw.mean - view.center;
      const Vec3<float> to_gaussian = direction(offset);
      sh_basis(kDegree, to_gaussian, basis);
      float d_basis[kMaxShCoefficients];
      basis_gradient<kDegree>(g.sh + row * stride, stride, d_color, d_basis);
      d_raw.mean = d_raw.mean + direction_vjp(offset, sh_basis_vjp(kDegree, to_gaussian, d_basis));
    }
    adam3(g.means, first.means, second.means, row, d_raw.mean, u.settings.means, u.rates);
    adam3(g.log_scales, first.log_scales, second.log_scales, row, d_raw.log_scale, u.settings.log_scales, u.rates);
    const Quaternion<float>& q = d_raw.quaternion;
    const float rate = u.settings.quaternions;
    adam4(g.quaternions, first.quaternions, second.quaternions, row, make_float4(q.w, q.x, q.y, q.z),
          make_float4(rate, rate, rate, rate), u.rates);
    adam(g.opacities[row], d_opacity, first.opacities[row], second.opacities[row], u.settings.opacities, u.rates);
  }
#pragma unroll
  for (int k = 0; k < kCoefficients; ++k) bases[k][threadIdx.x] = basis[k];
#pragma unroll
  for (int c = 0; c < 3; ++c) d_colors[c][threadIdx.x] = d_color[c];
  __syncthreads();

  const int n_rows = int(g.n - first_row < kFusedThreads ? g.n - first_row : kFusedThreads);
  float *sh = g.sh + first_row * stride, *sh_first = first.sh + first_row * stride,
        *sh_second = second.sh + first_row * stride;
  const auto gradient_of = [&](int of_row, int column) {
    const int k = column / 3;
    return k < kCoefficients ? bases[k][of_row] * d_colors[column - 3 * k][of_row] : 0.0f;
  };
  const auto rate_of = [&](int column) { return column < 3 ? u.settings.sh_dc : u.settings.sh_rest; };
  if (stride % 4 == 0) {
    for (int i = int(threadIdx.x); i < n_rows * stride / 4; i += kFusedThreads) {
      const int of_row = 4 * i / stride, column = 4 * i - of_row * stride;
      const float4 gradient = make_float4(gradient_of(of_row, column), gradient_of(of_row, column + 1),
                                          gradient_of(of_row, column + 2), gradient_of(of_row, column + 3));
      const float rest = u.settings.sh_rest;
      const float4 rate =
          column == 0 ? make_float4(rate_of(0), rate_of(1), rate_of(2), rest) : make_float4(rest, rest, rest, rest);
      adam4(sh, sh_first, sh_second, i, gradient, rate, u.rates);
    }
  } else {
    for (int i = int(threadIdx.x); i < n_rows * stride; i += kFusedThreads) {
      const int of_row = i / stride, column = i - of_row * stride;
      adam(sh[i], gradient_of(of_row, column), sh_first[i], sh_second[i], rate_of(column), u.rates);
    }
  }
}

// Calls launch(std::integral_constant of the degree).
template <class Launch>
void for_degree(int degree, Launch&& launch) {
  switch (degree) {
    case 0:
      return launch(std::integral_constant<int, 0>());
    case 1:
      return launch(std::integral_constant<int, 1>());
    case 2:
      return launch(std::integral_constant<int, 2>());
    default:
      return launch(std::integral_constant<int, 3>());
  }
}

struct ProjectScratch {
  LookBack look_back;
  ProjectedCounts* counts;

  static ProjectScratch of(Arena& arena, int64_t n_gaussians) {
    return {LookBack::of(arena, n_blocks_of(n_gaussians, kThreads)), arena.take<ProjectedCounts>(1)};
  }
};

}  // namespace
}  // namespace cuda

size_t project_scratch(const Cuda&, int64_t n_gaussians) {
  Arena arena(nullptr);
  cuda::ProjectScratch::of(arena, n_gaussians);
  return arena.used();
}

ProjectedCounts project(const Cuda& backend, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                        void* memory, const Projected& out) {
  const cudaStream_t stream = stream_of(backend);
  Arena arena(memory);
  const cuda::ProjectScratch scratch = cuda::ProjectScratch::of(arena, g.n);
  if (g.n == 0) {
    check(cudaMemsetAsync(out.instance_offsets, 0, sizeof(int64_t), stream), "project");
    return {0, 0};
  }
  check(cudaMemsetAsync(memory, 0, arena.used(), stream), "project");
  const cuda::View<float> view = cuda::view_of<float>(camera);
  cuda::for_degree(settings.sh_degree, [&](auto degree) {
    cuda::project_kernel<degree><<<n_blocks_of(g.n, cuda::kThreads), cuda::kThreads, 0, stream>>>(
        g, view, settings, {camera.tiles_x(), camera.tiles_y()}, scratch.look_back, out, scratch.counts);
  });
  check_launch("project");
  ProjectedCounts counts;
  check(cudaMemcpyAsync(&counts, scratch.counts, sizeof(counts), cudaMemcpyDeviceToHost, stream), "project");
  check(cudaStreamSynchronize(stream), "project");
  return counts;
}

void project_vjp(const Cuda& backend, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                 const Projected& projected, const float* d_splats, const Gaussians& d_g) {
  const cudaStream_t stream = stream_of(backend);
  const struct {
    float* array;
    int64_t n_columns;
  } tables[] = {{d_g.means, 3},
                {d_g.log_scales, 3},
                {d_g.quaternions, 4},
                {d_g.opacities, 1},
                {d_g.sh, 3 * int64_t(g.n_coefficients)}};
  for (const auto& table : tables) {
    check(cudaMemsetAsync(table.array, 0, size_t(g.n * table.n_columns) * sizeof(float), stream), "project'");
  }
  if (projected.n == 0) return;
  const cuda::View<float> view = cuda::view_of<float>(camera);
  cuda::for_degree(settings.sh_degree, [&](auto degree) {
    cuda::project_vjp_kernel<degree><<<n_blocks_of(projected.n, cuda::kThreads), cuda::kThreads, 0, stream>>>(
        g, view, settings, projected, d_splats, d_g);
  });
  check_launch("project'");
}

size_t project_vjp_update_scratch(const Cuda&, const Gaussians&) {
  return 0;
}

void project_vjp_update(const Cuda& backend, const Gaussians& values, const Camera& camera,
                        const RasterSettings& settings, const Projected& projected, const float* d_splats,
                        const AdamMoments& moments, const AdamSettings& adam, void*) {
  if (values.n == 0) return;
  const cuda::View<float> view = cuda::view_of<float>(camera);
  const cuda::FusedUpdate update = {moments, adam, cuda::AdamRates::of(adam)};
  cuda::for_degree(settings.sh_degree, [&](auto degree) {
    cuda::project_vjp_update_kernel<degree>
        <<<n_blocks_of(values.n, cuda::kFusedThreads), cuda::kFusedThreads, 0, stream_of(backend)>>>(
            values, view, settings, projected, d_splats, update);
  });
  check_launch("project' and update");
}

}  // namespace spaceport
