// project: raw parameters to splats on the image plane, one thread a Gaussian.
//
// The verb writes the visible ones one behind the other, in one pass over the rows; in a recorded step each stays at
// its row. Compiled without fused multiply-adds, as tile.cu is: both find the tiles of a splat, and must agree.
#define SPACEPORT_ISA cuda

#include "queued.cuh"
#include "rows.cuh"
#include "tile_spans.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = kLookBackRows;

struct Grid {
  int tiles_x, tiles_y;

  // No more than a guess: the centre is less than an image away from the principal point, and not behind the limit of
  // its tile.
  __device__ bool may_see(const Lens<float>& lens, const Vec3<float>& point, const NearSide& near_side) const {
    const float x = __fdividef(point.x * lens.fx, point.z), y = __fdividef(point.y * lens.fy, point.z);
    if (!(fabsf(x) < float(tiles_x * kTileSize) && fabsf(y) < float(tiles_y * kTileSize))) return false;
    const int column = int((x + lens.cx) / float(kTileSize)), row = int((y + lens.cy) / float(kTileSize));
    const bool is_inside = column >= 0 && column < tiles_x && row >= 0 && row < tiles_y;
    return !is_inside || near_side.holds(row * tiles_x + column);
  }
};

struct Touched {
  TileSet tiles;
  bool is_seen;  // by some tile, were it not for the limits
  bool is_far;   // reaches further than a TileSet's box: its tiles are yet to be counted
};
__device__ Touched tiles_of(const Splat& splat, const Grid& grid, const NearSide& near_side) {
  const TileRows tiles(splat, grid.tiles_x, grid.tiles_y);
  const TileSpan box = tile_span(splat.x - splat.extent_x, splat.x + splat.extent_x, grid.tiles_x);
  Touched touched = {{uint32_t(tiles.rows.begin) << 16 | uint32_t(box.begin), 0, 0}, false, false};
  touched.is_far = box.end - box.begin > kTileBoxSide || tiles.rows.end - tiles.rows.begin > kTileBoxSide;
  if (touched.is_far) return touched;
  for (int row = tiles.rows.begin; row < tiles.rows.end; ++row) {
    const TileSpan columns = tiles.columns(row);
    if (columns.begin >= columns.end) continue;
    touched.is_seen = true;
    uint64_t of_row = (uint64_t(1) << (columns.end - columns.begin)) - 1;
    for (int column = columns.begin; near_side.limits != nullptr && column < columns.end; ++column) {
      if (!near_side.holds(row * grid.tiles_x + column)) of_row &= ~(uint64_t(1) << (column - columns.begin));
    }
    touched.tiles.bits |= of_row << ((row - tiles.rows.begin) * kTileBoxSide + columns.begin - box.begin);
  }
  touched.tiles.n = unsigned(__popcll(touched.tiles.bits));
  return touched;
}

// A row on its way to be a splat: all but its colour.
struct Candidate {
  Splat splat;
  TileSet touched;     // none where it is not listed
  uint32_t depth_key;  // or why it is not
  bool is_far;         // see Touched
  Vec3<float> offset;  // from the camera
};
__device__ Candidate candidate_of(const Gaussians& g, int64_t row, const View<float>& view,
                                  const RasterSettings& settings, const Grid& grid, const uint32_t* depth_limits) {
  Candidate c = {};
  c.depth_key = kNoDepth;
  const float logit = g.opacities[row], opacity = sigmoid(logit);
  const RawShape<float> raw = raw_shape_of(g, row);
  const Vec3<float> point = point_in_cam(view, raw.mean);
  if (!(point.z >= settings.near) || !(opacity >= kAlphaCutoff)) return c;
  const NearSide near_side = {depth_limits, depth_key(point.z, settings.near)};
  if (grid.may_see(view.lens, point, near_side)) prefetch_row(g.sh + row * 3 * g.n_coefficients, 3 * g.n_coefficients);
  const Shape<float> s = shape_of(raw, view, settings.low_pass);
  if (!(norm_squared(raw.quaternion) >= kMinQuaternionNormSquared) || !(s.determinant > 0.0f)) return c;
  if (!(doubt_of(s, Vec3<float>{}, opacity, logit) == 0.0f)) return c;
  const float level = ellipse_level(opacity);
  c.splat = {s.x,
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
  c.offset = raw.mean - view.center;
  const Touched touched = tiles_of(c.splat, grid, near_side);
  c.touched = touched.tiles;
  c.is_far = touched.is_far;
  c.depth_key = c.touched.n > 0 || c.is_far ? near_side.depth_key : touched.is_seen ? kHidden : kNoDepth;
  return c;
}

// Counts the tiles of a warp's candidates that reach far, all lanes on one of them: in a thread of its own each would
// hold up the others. Depth limits are not for these.
__device__ void count_far_tiles(Candidate& c, const Grid& grid) {
  const int lane = int(threadIdx.x % 32);
  for (unsigned far = __ballot_sync(kAllLanes, c.is_far); far != 0; far &= far - 1) {
    const int owner = __ffs(int(far)) - 1;
    const auto shared = [&](float own) { return __shfl_sync(kAllLanes, own, owner); };
    const Splat& s = c.splat;
    Splat splat = {shared(s.x), shared(s.y), shared(s.a), shared(s.b), shared(s.c), shared(s.opacity)};
    splat.extent_x = shared(s.extent_x);
    splat.extent_y = shared(s.extent_y);
    const TileRows tiles(splat, grid.tiles_x, grid.tiles_y);
    unsigned n = 0;
    for (int row = tiles.rows.begin + lane; row < tiles.rows.end; row += 32) {
      const TileSpan columns = tiles.columns(row);
      if (columns.begin < columns.end) n += unsigned(columns.end - columns.begin);
    }
    for (int step = 16; step > 0; step /= 2) n += __shfl_xor_sync(kAllLanes, n, step);
    if (lane == owner) {
      c.touched.n = n;
      if (n == 0) c.depth_key = kNoDepth;
    }
  }
}

// Colours the candidates of a warp; those whose colour is not finite touch no tile.
template <int kDegree>
__device__ void color(const Gaussians& g, int64_t first_row, Candidate& c, float4* staged_fours) {
  constexpr int kColumns = 3 * n_coefficients_of(kDegree);
  const int lane = int(threadIdx.x % 32), stride = 3 * g.n_coefficients;
  const StagedRows<kColumns> staged(staged_fours);
  const unsigned visible = __ballot_sync(kAllLanes, c.touched.n > 0);
  if (StagedRows<kColumns>::fit(stride)) {
    const float* rows = g.sh + first_row * stride;
    staged.load(lane, [&](int slot) { return (visible >> slot & 1u) != 0 ? rows + slot * stride : nullptr; });
    __syncwarp();
  }
  if (c.touched.n == 0) return;
  float basis[kMaxShCoefficients], sh[kColumns];
  sh_basis(kDegree, direction(c.offset), basis);
  if (StagedRows<kColumns>::fit(stride)) {
    staged.get(lane, sh);
  } else {
    load_row<kColumns>(g.sh + (first_row + lane) * stride, stride, sh);
  }
  const Vec3<float> color = color_of(kDegree, basis, sh);
  if (!(poison(color.x) + poison(color.y) + poison(color.z) == 0.0f)) {
    c.touched = {};
    c.depth_key = kNoDepth;
  }
  c.splat.red = fmaxf(color.x, 0.0f);
  c.splat.green = fmaxf(color.y, 0.0f);
  c.splat.blue = fmaxf(color.z, 0.0f);
}

__device__ void write(const Projected& out, int64_t at, const Candidate& c) {
  const Splat& s = c.splat;
  float4* to = reinterpret_cast<float4*>(out.splats + at);
  to[0] = make_float4(s.x, s.y, s.a, s.b);
  to[1] = make_float4(s.c, s.opacity, s.red, s.green);
  to[2] = make_float4(s.blue, s.depth, s.extent_x, s.extent_y);
  out.touched[at] = c.touched;
}

// Splats follow each other in the order of their rows. Both counts go into one word of the look-back.
struct Compacted {
  LookBack look_back;
  static constexpr int kSplatBits = 28;

  __device__ static uint64_t packed(const Count& count) {
    return uint64_t(count.instances) << kSplatBits | count.splats;
  }
  __device__ static ProjectedCounts unpacked(uint64_t counts) {
    return {int64_t(counts & ((uint64_t(1) << kSplatBits) - 1)), int64_t(counts >> kSplatBits)};
  }
  __device__ unsigned block() const {
    __shared__ unsigned number;
    if (threadIdx.x == 0) number = atomicAdd(look_back.ticket, 1u);
    __syncthreads();
    return number;
  }
  __device__ void place(unsigned block, int64_t row, int64_t, const Candidate& c, const Projected& out,
                        ProjectedCounts* counts) const {
    __shared__ uint64_t sum_of_others;
    const BlockSums sums = block_sums<kThreads>({c.touched.n > 0, c.touched.n});
    if (threadIdx.x < 32) {
      const uint64_t before = sum_before(look_back.counts, block, packed(sums.total));
      if (threadIdx.x == 0) {
        sum_of_others = before;
        if (block == gridDim.x - 1) {
          *counts = unpacked(before + packed(sums.total));
          out.instance_offsets[counts->n_splats] = counts->n_instances;
        }
      }
    }
    __syncthreads();
    if (c.touched.n == 0) return;
    const ProjectedCounts before = unpacked(sum_of_others + packed(sums.before));
    write(out, before.n_splats, c);
    out.gaussian_from_splat[before.n_splats] = int32_t(row);
    out.instance_offsets[before.n_splats] = before.n_instances;
    out.depth_keys[before.n_splats] = with_count(c.depth_key, c.touched.n);
  }
};

// A splat lies where its Gaussian does: no block waits for another.
struct InPlace {
  __device__ unsigned block() const { return blockIdx.x; }
  __device__ void place(unsigned, int64_t row, int64_t n_rows, const Candidate& c, const Projected& out,
                        ProjectedCounts* counts) const {
    if (c.touched.n > 0) write(out, row, c);
    if (row < n_rows) out.depth_keys[row] = with_count(c.depth_key, c.touched.n);
    const BlockSums sums = block_sums<kThreads>({c.touched.n > 0, c.touched.n});
    if (threadIdx.x == 0 && sums.total.splats > 0) {
      using Word = unsigned long long;
      atomicAdd(reinterpret_cast<Word*>(&counts->n_splats), Word(sums.total.splats));
      atomicAdd(reinterpret_cast<Word*>(&counts->n_instances), Word(sums.total.instances));
    }
  }
};

template <int kDegree, class Placing>
__global__ __launch_bounds__(kThreads, 3) void project_kernel(Gaussians g, Late<View<float>> late_view,
                                                              Late<uint32_t*> depth_limits, RasterSettings settings,
                                                              Grid grid, Placing placing, Projected out,
                                                              ProjectedCounts* counts) {
  const unsigned block = placing.block();
  const int64_t row = int64_t(block) * kThreads + threadIdx.x;
  const View<float> view = late_view.get();
  Candidate candidate = {};
  if (row < g.n) candidate = candidate_of(g, row, view, settings, grid, depth_limits.get());
  count_far_tiles(candidate, grid);
  extern __shared__ float4 staged[];
  color<kDegree>(g, row - threadIdx.x % 32, candidate,
                 staged + threadIdx.x / 32 * 32 * StagedRows<3 * n_coefficients_of(kDegree)>::kStride);
  placing.place(block, row, g.n, candidate, out, counts);
}

template <class Placing>
void launch_project(cudaStream_t stream, const Gaussians& g, const Late<View<float>>& view,
                    const Late<uint32_t*>& depth_limits, const Camera& camera, const RasterSettings& settings,
                    const Placing& placing, const Projected& out, ProjectedCounts* counts) {
  const Grid grid = {camera.tiles_x(), camera.tiles_y()};
  for_degree(settings.sh_degree, [&](auto degree) {
    constexpr int kStaged = kThreads * StagedRows<3 * n_coefficients_of(degree)>::kStride * int(sizeof(float4));
    const auto kernel = project_kernel<degree, Placing>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStaged), "project");
    kernel<<<n_blocks_of(g.n, kThreads), kThreads, kStaged, stream>>>(g, view, depth_limits, settings, grid, placing,
                                                                      out, counts);
  });
  check_launch("project");
}

// Writes the gradient by a splat's Gaussian; returns that by the pose.
template <int kDegree>
__device__ PoseGradient<float> project_splat_vjp(const Gaussians& g, const View<float>& view, float low_pass,
                                                 const Projected& projected, const SplatGradient& d_splats,
                                                 const Gaussians& d_g, int64_t splat) {
  const int64_t row = projected.gaussian_from_splat[splat];
  const float* d = d_splats.rows + splat * d_splats.n_columns;
  const RawShape<float> raw = raw_shape_of(g, row);
  const Shape<float> s = shape_of(raw, view, low_pass);
  ProjectedAxesGradient<float> d_seen = seen_shape_vjp(view, s, d[0], d[1], Conic<float>{d[2], d[3], d[4]});
  if (has_depth(d_splats.n_columns)) d_seen.d_point.z += d[9];
  const RawShape<float> d_raw = shape_of_vjp(raw, view, s, d_seen);
  const float opacity = sigmoid(g.opacities[row]);

  constexpr int kColumns = 3 * n_coefficients_of(kDegree);
  float basis[kMaxShCoefficients], d_basis[kMaxShCoefficients], sh[kColumns];
  const Vec3<float> offset = raw.mean - view.center;
  const Vec3<float> to_gaussian = direction(offset);
  sh_basis(kDegree, to_gaussian, basis);
  load_row<kColumns>(g.sh + row * 3 * g.n_coefficients, 3 * g.n_coefficients, sh);
  const Vec3<float> color = color_of(kDegree, basis, sh);
  const Vec3<float> d_color = {color.x > 0.0f ? d[6] : 0.0f, color.y > 0.0f ? d[7] : 0.0f,
                               color.z > 0.0f ? d[8] : 0.0f};
  color_of_vjp(kDegree, basis, d_color, sh, d_basis);
  store_row<kColumns>(d_g.sh + row * 3 * g.n_coefficients, 3 * g.n_coefficients, sh);

  const Vec3<float> d_offset = direction_vjp(offset, sh_basis_vjp(kDegree, to_gaussian, d_basis));
  store3(d_g.means, row, d_raw.mean + d_offset);
  store3(d_g.log_scales, row, d_raw.log_scale);
  const Quaternion<float>& q = d_raw.quaternion;
  reinterpret_cast<float4*>(d_g.quaternions)[row] = make_float4(q.w, q.x, q.y, q.z);
  d_g.opacities[row] = d[5] * opacity * (1.0f - opacity);
  return pose_vjp(raw, view, s, d_seen, -1.0f * d_offset);
}

// The sum over a block's threads, in an order that is always the same.
__device__ void sum_poses(const PoseGradient<float>& d, double* out) {
  __shared__ float of_warps[kThreads / 32][kPoseSize];
  const Mat3<float>& r = d.d_rotation;
  const Vec3<float>& t = d.d_translation;
  const float own[kPoseSize] = {r.row[0].x, r.row[0].y, r.row[0].z, t.x,        r.row[1].x, r.row[1].y,
                                r.row[1].z, t.y,        r.row[2].x, r.row[2].y, r.row[2].z, t.z};
#pragma unroll
  for (int k = 0; k < kPoseSize; ++k) {
    const float sum = warp_sum(own[k]);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][k] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kPoseSize) return;
  double sum = 0.0;
  for (const auto& of_warp : of_warps) sum += double(of_warp[threadIdx.x]);
  out[threadIdx.x] = sum;
}

// One block a number of the pose.
__global__ __launch_bounds__(kThreads) void sum_blocks_kernel(const double* of_blocks, int64_t n_blocks, double* out) {
  __shared__ double of_threads[kThreads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n_blocks; i += kThreads) sum += of_blocks[i * kPoseSize + blockIdx.x];
  of_threads[threadIdx.x] = sum;
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < n) of_threads[threadIdx.x] += of_threads[threadIdx.x + n];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = of_threads[0];
}

// One block a multiprocessor suffices: for more of them the compiler would spill.
template <int kDegree, bool kPose>
__global__ __launch_bounds__(kThreads, 1) void project_vjp_kernel(Gaussians g, View<float> view, float low_pass,
                                                                  Projected projected, SplatGradient d_splats,
                                                                  Gaussians d_g, double* pose_of_blocks) {
  const int64_t splat = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  PoseGradient<float> d_pose = {};
  if (splat < projected.n) d_pose = project_splat_vjp<kDegree>(g, view, low_pass, projected, d_splats, d_g, splat);
  if constexpr (kPose) sum_poses(d_pose, pose_of_blocks + int64_t(blockIdx.x) * kPoseSize);
}

}  // namespace

void queue_project(cudaStream_t stream, const Gaussians& g, const Late<View<float>>& view,
                   const Late<uint32_t*>& depth_limits, const Camera& camera, const RasterSettings& settings,
                   const Projected& out, ProjectedCounts* counts) {
  launch_project(stream, g, view, depth_limits, camera, settings, InPlace{}, out, counts);
}

}  // namespace cuda

size_t project_scratch(const Cuda&, int64_t n_gaussians) {
  return cuda::LookBack::n_bytes(n_gaussians) + sizeof(ProjectedCounts);
}

ProjectedCounts project(const Cuda& backend, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                        void* scratch, const Projected& out) {
  const cudaStream_t stream = stream_of(backend);
  if (g.n == 0) {
    check(cudaMemsetAsync(out.instance_offsets, 0, sizeof(int64_t), stream), "project");
    return {0, 0};
  }
  Arena arena(scratch);
  const cuda::LookBack look_back = cuda::LookBack::of(arena, g.n);
  check(cudaMemsetAsync(scratch, 0, arena.used(), stream), "project");
  ProjectedCounts counts, *on_device = arena.take<ProjectedCounts>(1);
  cuda::launch_project(stream, g, cuda::Late<cuda::View<float>>(cuda::view_of<float>(camera)),
                       cuda::Late<uint32_t*>(nullptr), camera, settings, cuda::Compacted{look_back}, out, on_device);
  check(cudaMemcpyAsync(&counts, on_device, sizeof(counts), cudaMemcpyDeviceToHost, stream), "project");
  check(cudaStreamSynchronize(stream), "project");
  return counts;
}

size_t project_vjp_scratch(const Cuda&, int64_t n_splats) {
  return size_t(n_blocks_of(n_splats, cuda::kThreads)) * kPoseSize * sizeof(double);
}

void project_vjp(const Cuda& backend, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                 const Projected& projected, const SplatGradient& d_splats, const ProjectGradient& out) {
  const cudaStream_t stream = stream_of(backend);
  const Gaussians& d_g = out.gaussians;
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
  const bool has_pose = out.cam_from_world != nullptr;
  if (has_pose) check(cudaMemsetAsync(out.cam_from_world, 0, kPoseSize * sizeof(double), stream), "project'");
  if (projected.n == 0) return;
  const cuda::View<float> view = cuda::view_of<float>(camera);
  const unsigned n_blocks = n_blocks_of(projected.n, cuda::kThreads);
  double* pose_of_blocks = static_cast<double*>(out.scratch);  // [n_blocks, 12]
  cuda::for_degree(settings.sh_degree, [&](auto degree) {
    const auto kernel = has_pose ? cuda::project_vjp_kernel<degree, true> : cuda::project_vjp_kernel<degree, false>;
    kernel<<<n_blocks, cuda::kThreads, 0, stream>>>(g, view, settings.low_pass, projected, d_splats, d_g,
                                                    pose_of_blocks);
  });
  if (has_pose) {
    cuda::sum_blocks_kernel<<<kPoseSize, cuda::kThreads, 0, stream>>>(pose_of_blocks, n_blocks, out.cam_from_world);
  }
  check_launch("project'");
}

}  // namespace spaceport
