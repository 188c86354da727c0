// project: raw parameters to splats on the image plane, one thread a Gaussian.
//
// Visible ones are written in the order of their rows, in one pass over them. Compiled without fused multiply-adds, as
// tile.cu is: both find the tiles of a splat, and must agree.
#define SPACEPORT_ISA cuda

#include "look_back.cuh"
#include "queued.cuh"
#include "tile_spans.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;

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

constexpr int kBoxSide = 8;  // tiles of a TileSet

__device__ TileSet tiles_of(const Splat& splat, const Grid& grid) {
  const TileRows tiles(splat, grid.tiles_x, grid.tiles_y);
  const TileSpan box = tile_span(splat.x - splat.extent_x, splat.x + splat.extent_x, grid.tiles_x);
  const bool is_in_box = box.end - box.begin <= kBoxSide && tiles.rows.end - tiles.rows.begin <= kBoxSide;
  TileSet set = {uint16_t(box.begin), uint16_t(tiles.rows.begin), 0, 0};
  for (int row = tiles.rows.begin; row < tiles.rows.end; ++row) {
    const TileSpan columns = tiles.columns(row);
    if (columns.begin >= columns.end) continue;
    const unsigned n = unsigned(columns.end - columns.begin);
    set.n += n;
    if (is_in_box) {
      const int first = (row - tiles.rows.begin) * kBoxSide + columns.begin - box.begin;
      set.bits |= ((uint64_t(1) << n) - 1) << first;
    }
  }
  return set;
}

// The splat of a row and the tiles that it touches; none where it is not visible.
template <int kDegree>
__device__ TileSet project_row(const Gaussians& g, int64_t row, const View<float>& view, const RasterSettings& settings,
                               const Grid& grid, Splat& splat) {
  const TileSet none = {};
  const float logit = g.opacities[row], opacity = sigmoid(logit);
  const RawShape<float> raw = raw_shape_of(g, row);
  if (!(point_in_cam(view, raw.mean).z >= settings.near) || !(opacity >= kAlphaCutoff)) return none;
  const Shape<float> s = shape_of(raw, view, settings.low_pass);
  if (!(norm_squared(raw.quaternion) >= kMinQuaternionNormSquared) || !(s.determinant > 0.0f)) return none;
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
  const TileSet touched = tiles_of(splat, grid);
  if (touched.n == 0) return none;
  float basis[kMaxShCoefficients], sh[3 * n_coefficients_of(kDegree)];
  sh_basis(kDegree, direction(raw.mean - view.center), basis);
  load_sh<3 * n_coefficients_of(kDegree)>(g.sh, row, 3 * g.n_coefficients, sh);
  const Vec3<float> color = color_of(kDegree, basis, sh);
  if (!(doubt_of(s, color, opacity, logit) == 0.0f)) return none;
  splat.red = fmaxf(color.x, 0.0f);
  splat.green = fmaxf(color.y, 0.0f);
  splat.blue = fmaxf(color.z, 0.0f);
  return touched;
}

// Both counts in one word of the look-back.
constexpr int kSplatBits = 28;
__device__ uint64_t packed(const Count& count) {
  return uint64_t(count.instances) << kSplatBits | count.splats;
}

template <int kDegree>
__global__ __launch_bounds__(kThreads) void project_kernel(Gaussians g, Late<View<float>> late_view,
                                                           RasterSettings settings, Grid grid, LookBack look_back,
                                                           Projected out, ProjectedCounts* counts) {
  __shared__ unsigned block;
  __shared__ uint64_t sum_of_others;
  if (threadIdx.x == 0) block = atomicAdd(look_back.ticket, 1u);
  __syncthreads();
  const int64_t row = int64_t(block) * kThreads + threadIdx.x;
  const View<float> view = late_view.get();
  Splat splat;
  TileSet touched = {};
  if (row < g.n) touched = project_row<kDegree>(g, row, view, settings, grid, splat);
  const BlockSums sums = block_sums<kThreads>({touched.n > 0, touched.n});
  if (threadIdx.x < 32) {
    const uint64_t before = sum_before(look_back.counts, block, packed(sums.total));
    if (threadIdx.x == 0) {
      sum_of_others = before;
      if (block == gridDim.x - 1) {
        const uint64_t total = before + packed(sums.total);
        *counts = {int64_t(total & ((uint64_t(1) << kSplatBits) - 1)), int64_t(total >> kSplatBits)};
        if (out.instance_offsets != nullptr) out.instance_offsets[counts->n_splats] = counts->n_instances;
      }
    }
  }
  __syncthreads();
  if (touched.n == 0) return;
  const uint64_t before = sum_of_others + packed(sums.before);
  const int64_t at = int64_t(before & ((uint64_t(1) << kSplatBits) - 1));
  float4* to = reinterpret_cast<float4*>(out.splats + at);
  to[0] = make_float4(splat.x, splat.y, splat.a, splat.b);
  to[1] = make_float4(splat.c, splat.opacity, splat.red, splat.green);
  to[2] = make_float4(splat.blue, splat.depth, splat.extent_x, splat.extent_y);
  out.gaussian_from_splat[at] = int32_t(row);
  out.depths[at] = splat.depth;
  out.touched[at] = touched;
  if (out.instance_offsets != nullptr) out.instance_offsets[at] = int64_t(before >> kSplatBits);
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

// Row of the first of n splats whose Gaussian is not before `gaussian`.
__device__ int64_t first_splat_from(const Projected& projected, int64_t n, int64_t gaussian) {
  int64_t low = 0, high = n;
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
__device__ int64_t splat_of_row(const Projected& projected, int64_t n, int64_t first_row) {
  __shared__ int64_t splats[kFusedThreads];
  __shared__ int64_t begin;
  splats[threadIdx.x] = -1;
  if (threadIdx.x == 0) begin = first_splat_from(projected, n, first_row);
  __syncthreads();
  const int64_t splat = begin + threadIdx.x;
  if (splat < n) {
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

// A splat's gradient from its row, which is left zero if it held the sums of blend'.
__device__ void take_gradient(const SplatGradients& gradients, int64_t splat, const Shape<float>& s, float opacity,
                              float d[kSplatGradientStride]) {
  float* row = gradients.rows + splat * kSplatGradientStride;
#pragma unroll
  for (int i = 0; i < kSplatGradientStride; ++i) d[i] = row[i];
  if (gradients.kind == SplatRows::kGradients) return;
  bool is_zero = true;
#pragma unroll
  for (int i = 0; i < kSplatGradientStride; ++i) is_zero &= d[i] == 0.0f;
  if (is_zero) return;
#pragma unroll
  for (int i = 0; i < kSplatGradientStride; ++i) row[i] = 0.0f;
  gradient_of_moments(s.conic, opacity, d);
}

// A thread takes a row's place and shape; then all take the block's SH coefficients, which lie one behind the other,
// four at a time: their gradient is the product of a basis value and of the gradient by a colour.
template <int kDegree>
__global__ __launch_bounds__(kFusedThreads) void project_vjp_update_kernel(
    Gaussians g, Late<UpdateInputs> late_inputs, RasterSettings settings, float2 half_size, Projected projected,
    Late<ProjectedCounts> late_counts, SplatGradients gradients, AdamMoments moments, const uint32_t* is_halted) {
  constexpr int kCoefficients = n_coefficients_of(kDegree);
  __shared__ float bases[kCoefficients][kFusedThreads + 1];
  __shared__ float d_colors[3][kFusedThreads + 1];
  __shared__ UpdateInputs u;
  late_inputs.copy_to(u);
  const int64_t first_row = int64_t(blockIdx.x) * kFusedThreads, row = first_row + threadIdx.x;
  const int stride = 3 * g.n_coefficients;
  const int64_t splat = splat_of_row(projected, late_counts.get().n_splats, first_row);
  const bool changes_nothing = is_halted != nullptr && *is_halted != 0;
  const Gaussians &first = moments.first, &second = moments.second;
  float basis[kMaxShCoefficients] = {}, d_color[3] = {};
  if (row < g.n) {
    RawShape<float> d_raw = {};
    float d_opacity = 0.0f;
    if (splat >= 0) {
      const Splat& seen = projected.splats[splat];
      const RawShape<float> raw = raw_shape_of(g, row);
      const Shape<float> s = shape_of(raw, u.view, settings.low_pass);
      float d[kSplatGradientStride];
      take_gradient(gradients, splat, s, seen.opacity, d);
      if (u.statistics.gradient_sums != nullptr && !changes_nothing) {
        u.statistics.gradient_sums[row] += hypotf(d[0] * half_size.x, d[1] * half_size.y);
        u.statistics.n_visible[row] += 1.0f;
      }
      d_raw = shape_of_vjp(raw, u.view, s, d[0], d[1], Conic<float>{d[2], d[3], d[4]});
      d_opacity = d[5] * seen.opacity * (1.0f - seen.opacity);
      d_color[0] = seen.red > 0.0f ? d[6] : 0.0f;
      d_color[1] = seen.green > 0.0f ? d[7] : 0.0f;
      d_color[2] = seen.blue > 0.0f ? d[8] : 0.0f;
      const Vec3<float> offset = raw.mean - u.view.center;
      const Vec3<float> to_gaussian = direction(offset);
      sh_basis(kDegree, to_gaussian, basis);
      float d_basis[kMaxShCoefficients];
      basis_gradient<kDegree>(g.sh + row * stride, stride, d_color, d_basis);
      d_raw.mean = d_raw.mean + direction_vjp(offset, sh_basis_vjp(kDegree, to_gaussian, d_basis));
    }
    if (!changes_nothing) {
      adam3(g.means, first.means, second.means, row, d_raw.mean, u.settings.means, u.rates);
      adam3(g.log_scales, first.log_scales, second.log_scales, row, d_raw.log_scale, u.settings.log_scales, u.rates);
      const Quaternion<float>& q = d_raw.quaternion;
      const float rate = u.settings.quaternions;
      adam4(g.quaternions, first.quaternions, second.quaternions, row, make_float4(q.w, q.x, q.y, q.z),
            make_float4(rate, rate, rate, rate), u.rates);
      adam(g.opacities[row], d_opacity, first.opacities[row], second.opacities[row], u.settings.opacities, u.rates);
    }
  }
  if (changes_nothing) return;
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

}  // namespace

size_t queued_project_scratch(int64_t n_gaussians) {
  return LookBack::n_bytes(n_blocks_of(n_gaussians, kThreads));
}

void queue_project(cudaStream_t stream, const Gaussians& g, const Late<View<float>>& view, const Camera& camera,
                   const RasterSettings& settings, void* scratch, const Projected& out, ProjectedCounts* counts) {
  Arena arena(scratch);
  const LookBack look_back = LookBack::of(arena, n_blocks_of(g.n, kThreads));
  const Grid grid = {camera.tiles_x(), camera.tiles_y()};
  for_degree(settings.sh_degree, [&](auto degree) {
    project_kernel<degree>
        <<<n_blocks_of(g.n, kThreads), kThreads, 0, stream>>>(g, view, settings, grid, look_back, out, counts);
  });
  check_launch("project");
}

}  // namespace cuda

size_t project_scratch(const Cuda&, int64_t n_gaussians) {
  return cuda::queued_project_scratch(n_gaussians) + sizeof(ProjectedCounts);
}

ProjectedCounts project(const Cuda& backend, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                        void* scratch, const Projected& out) {
  const cudaStream_t stream = stream_of(backend);
  if (g.n == 0) {
    check(cudaMemsetAsync(out.instance_offsets, 0, sizeof(int64_t), stream), "project");
    return {0, 0};
  }
  const size_t n_bytes = cuda::queued_project_scratch(g.n);
  ProjectedCounts* on_device = reinterpret_cast<ProjectedCounts*>(static_cast<char*>(scratch) + n_bytes);
  check(cudaMemsetAsync(scratch, 0, n_bytes, stream), "project");
  cuda::queue_project(stream, g, cuda::Late<cuda::View<float>>(cuda::view_of<float>(camera)), camera, settings, scratch,
                      out, on_device);
  ProjectedCounts counts;
  check(cudaMemcpyAsync(&counts, on_device, sizeof(counts), cudaMemcpyDeviceToHost, stream), "project");
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

void cuda::queue_project_vjp_update(cudaStream_t stream, const Gaussians& values, const Late<UpdateInputs>& inputs,
                                    const Camera& camera, const RasterSettings& settings, const Projected& projected,
                                    const Late<ProjectedCounts>& counts, const SplatGradients& gradients,
                                    const AdamMoments& moments, const uint32_t* is_halted) {
  const float2 half_size = make_float2(0.5f * float(camera.width), 0.5f * float(camera.height));
  for_degree(settings.sh_degree, [&](auto degree) {
    project_vjp_update_kernel<degree><<<n_blocks_of(values.n, kFusedThreads), kFusedThreads, 0, stream>>>(
        values, inputs, settings, half_size, projected, counts, gradients, moments, is_halted);
  });
  check_launch("project' and update");
}

void project_vjp_update(const Cuda& backend, const Gaussians& values, const Camera& camera,
                        const RasterSettings& settings, const Projected& projected, const float* d_splats,
                        const AdamMoments& moments, const AdamSettings& adam, void*) {
  if (values.n == 0) return;
  const cuda::UpdateInputs inputs = {cuda::view_of<float>(camera), adam, cuda::AdamRates::of(adam), {}};
  cuda::queue_project_vjp_update(stream_of(backend), values, cuda::Late<cuda::UpdateInputs>(inputs), camera, settings,
                                 projected, cuda::Late<ProjectedCounts>(ProjectedCounts{projected.n, 0}),
                                 {cuda::SplatRows::kGradients, const_cast<float*>(d_splats)}, moments, nullptr);
}

}  // namespace spaceport
