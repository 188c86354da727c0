// blend: four warps a tile, each with a quarter of it (pixels.cuh). A warp takes 32 instances of the tile's list at a
// time, keeps those that can reach its quarter, and notes which did (`hits`): the backward pass visits no others.
#define SPACEPORT_ISA cuda

#include "pixels.cuh"

namespace spaceport {
namespace cuda {

namespace {

// Whether the splat may reach a pixel of a quarter: the largest exponent over the box of the pixels' centres. From any
// place in the box it grows on the way to the splat's centre, which leaves the box through one of the sides that face
// it; so the largest on each of these is looked at. A little wide: rounding must not hide what a pixel would see.
__device__ bool reaches(const SharedSplat& s, const Quarter& quarter) {
  constexpr float kLess = 1.0f - 2e-6f, kMargin = 1e-3f;
  const float a = kLess * s.rows[0].z, b = s.rows[0].w, c = kLess * s.rows[1].x, at_center = s.rows[1].y;
  const float left = float(quarter.left) + 0.5f - s.rows[0].x, right = left + float(kQuarter - 1);
  const float top = float(quarter.top) + 0.5f - s.rows[0].y, bottom = top + float(kQuarter - 1);
  const float dx = fminf(fmaxf(left, 0.0f), right), dy = fminf(fmaxf(top, 0.0f), bottom);  // of the sides
  const float best_dy = fminf(fmaxf(-0.5f * b * dx * reciprocal(c), top), bottom);
  const float best_dx = fminf(fmaxf(-0.5f * b * dy * reciprocal(a), left), right);
  const float on_column = fmaf(fmaf(c, best_dy, b * dx), best_dy, a * dx * dx);
  const float on_row = fmaf(fmaf(a, best_dx, b * dy), best_dx, c * dy * dy);
  return fmaxf(on_column, on_row) + at_center >= kSmallestExponent - kMargin;
}

constexpr int kThreads = 32 * kQuarters;

// The limit of a tile for its next visit. A little behind the last splat that anybody looked at: until then everything
// moves.
__device__ void set_limit(const DepthLimits& depth_limits, int64_t tile, bool is_opaque, float last_depth, float near) {
  constexpr uint32_t kMargin = 1u << (kDepthKeyBits - 4 - 4);  // a sixteenth of an octave, of sixteen
  uint32_t* limits = depth_limits.limits.get();
  if (limits == nullptr) return;
  if (!is_opaque && limits[tile] != kNoLimit) *depth_limits.is_undone = 1;
  limits[tile] = is_opaque ? depth_key(last_depth, near) + kMargin : kNoLimit;
}

// The depths of a thread's pixels.
struct PairDepths {
  float expected[kPixels], median[kPixels];

  __device__ void add(const Contribution& c, float z) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      constexpr float kMedian = kMedianTransmittance * kTPerUnit;
      const bool passes = c.t_before[p] >= kMedian && c.t_after[p] < kMedian;
      expected[p] = fmaf(c.weight[p], z, expected[p]);
      median[p] = passes && c.weight[p] > 0.0f ? z : median[p];
    }
  }
};

template <bool kDepth, bool kKeepsHits>
__global__ __launch_bounds__(kThreads, at_least(kDepth ? 8 : 10, kThreads)) void blend_kernel(
    const Splat* splats, Tiles tiles, TileGrid grid, RasterSettings settings, DepthLimits depth_limits,
    Late<Image> late_out) {
  __shared__ StagedSplats<kDepth> staged_by_warp[kQuarters];
  __shared__ int n_groups_of[kQuarters];
  const int lane = int(threadIdx.x % 32), number_of_quarter = int(threadIdx.x / 32);
  StagedSplats<kDepth>& staged = staged_by_warp[number_of_quarter];
  const int64_t tile = blockIdx.x;
  const Quarter quarter = Quarter::of(grid, tile, number_of_quarter);
  PixelPair pixels = quarter.pixels(grid, settings.alpha_max);
  float red[kPixels] = {}, green[kPixels] = {}, blue[kPixels] = {};
  PairDepths pixel_depths = {};
  const Image out = late_out.get();

  const int64_t begin = tiles.offsets[tile];
  const int n = int(tiles.offsets[tile + 1] - begin);
  const int32_t* instances = tiles.splat_from_instance + begin;
  const TileHits hits = TileHits::of(out.hits, tiles.n_instances, grid.n_tiles, tile, begin);
  int n_groups = 0;
  for (int first = 0; first < n; first += 32, ++n_groups) {
    if (__ballot_sync(kAllLanes, pixels.goes_on()) == 0) break;
    bool takes = false;
    SharedSplat seen;
    float depth = 0.0f;
    if (first + lane < n) {
      const int32_t number = instances[first + lane];
      const Splat splat = load_splat(splats + number);
      seen = SharedSplat(splat, number, kSplatGradientStride);
      depth = splat.depth;
      takes = reaches(seen, quarter);
    }
    const unsigned taken = __ballot_sync(kAllLanes, takes);
    const int place = __popc(taken & ((1u << lane) - 1u));
    if (takes) staged.set(place, seen, depth);
    __syncwarp();
    unsigned hit = 0, bit = 1;  // by this lane, of those taken
    staged.template visit<false>(__popc(taken), false, [&](int i, const StagedSplat& s) {
      const Contribution c = pixels.blend(s);
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        red[p] = fmaf(c.weight[p], s.red_green[0], red[p]);
        green[p] = fmaf(c.weight[p], s.red_green[1], green[p]);
        blue[p] = fmaf(c.weight[p], s.blue, blue[p]);
      }
      if constexpr (kDepth) pixel_depths.add(c, staged.depth(i));
      if constexpr (kKeepsHits) {
        if (c.reached) hit |= bit;
        bit *= 2;
      }
    });
    if constexpr (kKeepsHits) {
      hit = warp_or(hit);
      const unsigned word = __ballot_sync(kAllLanes, takes && (hit >> place & 1u) != 0);
      if (lane == 0) hits.words[n_groups * kQuarters + number_of_quarter] = word;
    }
    __syncwarp();
  }
  if (lane == 0) {
    if constexpr (kKeepsHits) hits.n_groups[number_of_quarter] = n_groups;
    n_groups_of[number_of_quarter] = n_groups;
  }
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int row = quarter.row + p * kPixelDistance;
    if (quarter.column >= grid.width || row >= grid.height) continue;
    const int64_t at = int64_t(row) * grid.width + quarter.column;
    const float t = fabsf(pixels.t[p]) / kTPerUnit;
    out.transmittance[at] = t;
    out.color[3 * at] = fmaf(t, settings.background[0], kWeightUnit * red[p]);
    out.color[3 * at + 1] = fmaf(t, settings.background[1], kWeightUnit * green[p]);
    out.color[3 * at + 2] = fmaf(t, settings.background[2], kWeightUnit * blue[p]);
    if constexpr (kDepth) {
      if (out.depth != nullptr) out.depth[at] = kWeightUnit * pixel_depths.expected[p];
      if (out.median_depth != nullptr) out.median_depth[at] = pixel_depths.median[p];
    }
  }
  const bool is_opaque = __syncthreads_or(pixels.goes_on()) == 0;
  if (threadIdx.x == 0) {
    const int most_groups = max(max(n_groups_of[0], n_groups_of[1]), max(n_groups_of[2], n_groups_of[3]));
    const int n_seen = min(32 * most_groups, n);
    const float last_depth = n_seen > 0 ? splats[instances[n_seen - 1]].depth : 0.0f;
    set_limit(depth_limits, tile, is_opaque, last_depth, settings.near);
  }
}

}  // namespace
}  // namespace cuda

int64_t hits_size(const Cuda&, int64_t n_instances, const Camera& camera) {
  const int64_t n_tiles = cuda::TileGrid::of(camera).n_tiles;
  return (n_instances / 32 + 2 * n_tiles) * cuda::kQuarters;
}

void cuda::queue_blend(cudaStream_t stream, const Projected& projected, const Tiles& tiles, const Camera& camera,
                       const RasterSettings& settings, const DepthLimits& depth_limits, const Late<Image>& out) {
  const TileGrid grid = TileGrid::of(camera);
  const bool has_depth = out.value.depth != nullptr || out.value.median_depth != nullptr;
  const bool keeps_hits = out.value.hits != nullptr;
  const auto kernel = has_depth ? (keeps_hits ? blend_kernel<true, true> : blend_kernel<true, false>)
                                : (keeps_hits ? blend_kernel<false, true> : blend_kernel<false, false>);
  kernel<<<unsigned(grid.n_tiles), kThreads, 0, stream>>>(projected.splats, tiles, grid, settings, depth_limits, out);
  check_launch("blend");
}

void blend(const Cuda& backend, const Projected& projected, const Tiles& tiles, const Camera& camera,
           const RasterSettings& settings, const Image& out) {
  const cuda::DepthLimits none = {cuda::Late<uint32_t*>(nullptr), nullptr};
  cuda::queue_blend(stream_of(backend), projected, tiles, camera, settings, none, cuda::Late<Image>(out));
}

}  // namespace spaceport
