// blend: four warps a tile, each with a quarter of it, 8x8 pixels, two a thread. Backward the same, warps on their own.
//
// Both walk the tile's list from front to back, all lanes of a warp on one splat: so a sum over the lanes belongs to
// one splat, and needs no knowledge of who takes part. When a splat is staged, one thread finds out which quarters it
// can reach. Forward notes which it did reach, 32 splats a word (`hits`); backward visits no others. Both share
// `PixelPair::blend`, so that the backward replays exactly what the forward did; the colour behind a splat is the final
// colour less the prefix up to it, without a division to recover T.
//
// Warps add what they find to the splats' sums as they come to it, in no fixed order. Where the order is to be fixed,
// they leave the sums of each instance instead (instance_sums.cuh).
#define SPACEPORT_ISA cuda

#include "instance_sums.cuh"
#include "queued.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kQuarter = kTileSize / 2;  // pixels along it
constexpr int kQuarters = 4;
constexpr int kPixels = 2;         // of a thread, one above the other
constexpr int kPixelDistance = 4;  // rows between them

// A splat as pixels see it: the exponent of alpha in base 2 is (a dx + b dy) dx + c dy^2 + log2(opacity).
struct StagedSplat {
  float x, y, a, b;
  float c, log2_opacity, red, green;
  float blue;
  uint32_t sums;  // where its sums begin, in floats

  __device__ static StagedSplat of(const Splat& s, int32_t number, int n_columns) {
    return {s.x,
            s.y,
            -0.5f * kLog2E * s.a,
            -kLog2E * s.b,
            -0.5f * kLog2E * s.c,
            log2f(s.opacity),
            s.red,
            s.green,
            s.blue,
            uint32_t(number) * uint32_t(n_columns)};
  }
};

// In shared memory: three loads of sixteen bytes, which all lanes share.
struct SplatRows {
  float4 rows[3];

  __device__ void set(const StagedSplat& s, float depth = 0.0f) {
    rows[0] = make_float4(s.x, s.y, s.a, s.b);
    rows[1] = make_float4(s.c, s.log2_opacity, s.red, s.green);
    rows[2] = make_float4(s.blue, __uint_as_float(s.sums), depth, 0.0f);
  }
  __device__ float depth() const { return rows[2].z; }
  __device__ StagedSplat get() const {
    const float4 a = rows[0], b = rows[1], c = rows[2];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, __float_as_uint(c.y)};
  }
};

__device__ Splat load_splat(const Splat* from) {
  const float4* rows = reinterpret_cast<const float4*>(from);
  const float4 a = __ldg(rows), b = __ldg(rows + 1), c = __ldg(rows + 2);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}

// The quarters of the tile at (left, top) with pixel centres in the ellipse alpha >= kAlphaCutoff, one bit each: for
// the two rows of quarters the reach of the ellipse to both sides, as in tile_spans.h. A little wide, never narrow.
__device__ unsigned quarters_reached(const Splat& s, float log2_opacity, float left, float top) {
  constexpr float kMargin = 0.01f;  // pixels
  const float level = 2.0f / kLog2E * (log2_opacity - kLog2Cutoff) + 1e-4f;
  const float half_width = sqrtf(__fdividef(level, s.a));
  const float slant = -__fdividef(s.b, s.a), rightmost_dy = -__fdividef(s.b, s.c) * s.extent_x;
  const float per_extent = __fdividef(1.0f, s.extent_y);
  unsigned reached = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float first = top + float(half * kQuarter) + 0.5f - s.y, last = first + float(kQuarter - 1);
    const float upper = fmaxf(first, -s.extent_y), lower = fminf(last, s.extent_y);
    const float dy_right = fminf(fmaxf(rightmost_dy, upper), lower), up_right = dy_right * per_extent;
    const float dy_left = fminf(fmaxf(-rightmost_dy, upper), lower), up_left = dy_left * per_extent;
    const float right = slant * dy_right + half_width * sqrtf(fmaxf(1.0f - up_right * up_right, 0.0f));
    const float leftmost = slant * dy_left - half_width * sqrtf(fmaxf(1.0f - up_left * up_left, 0.0f));
    const float x_first = s.x + fmaxf(leftmost, -s.extent_x) - kMargin - left;
    const float x_last = s.x + fminf(right, s.extent_x) + kMargin - left;
    const bool is_high_enough = first <= s.extent_y + kMargin && last >= -s.extent_y - kMargin;
    if (is_high_enough && x_first <= float(kQuarter) - 0.5f && x_last >= 0.5f) reached |= 1u << (2 * half);
    if (is_high_enough && x_first <= float(kTileSize) - 0.5f && x_last >= float(kQuarter) + 0.5f)
      reached |= 2u << (2 * half);
  }
  return reached;
}

// 2^x to 2 units in the last place; x is never so small that it matters what becomes of a denormal.
__device__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// condition ? a : b, as one instruction: the compiler makes branches of pairs of these.
__device__ float chosen(int condition, float a, float b) {
  float result;
  asm("{.reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p;}" : "=f"(result) : "f"(a), "f"(b), "r"(condition));
  return result;
}

// Adds to a float in global memory, without a branch around it.
__device__ void add_if(int condition, float* to, float value) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %2, 0; @p red.global.add.f32 [%0], %1;}" ::"l"(__cvta_generic_to_global(to)),
      "f"(value), "r"(condition)
      : "memory");
}

// What blending one splat into a thread's pixels does.
struct Contribution {
  float dx;
  float dy[kPixels];
  float alpha[kPixels];     // zero where the splat does not reach
  float weight[kPixels];    // alpha * T, zero where the pixel does not take part
  float t_before[kPixels];  // T in front of the splat, zero once the pixel has stopped
  bool goes_on[kPixels];    // the pixel does not stop here, nor has before
  bool reached;             // some pixel, if only to stop it
};

struct PixelPair {
  float x, y;        // centre of the upper one
  float t[kPixels];  // transmittance; zero once the pixel has stopped, or if it lies outside the image

  __device__ static PixelPair at(int column, int row, int width, int height) {
    PixelPair pair = {float(column) + 0.5f, float(row) + 0.5f, {}};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      pair.t[p] = column < width && row + p * kPixelDistance < height ? 1.0f : 0.0f;
    }
    return pair;
  }
  __device__ bool goes_on() const { return t[0] + t[1] > 0.0f; }

  __device__ Contribution blend(const StagedSplat& s, float alpha_max) {
    Contribution c;
    c.dx = x - s.x;
    const float by_dx = fmaf(s.a * c.dx, c.dx, s.log2_opacity), b_dx = s.b * c.dx;
    float most = 0.0f;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      c.dy[p] = y + float(p * kPixelDistance) - s.y;
      const float exponent = fmaf(fmaf(s.c, c.dy[p], b_dx), c.dy[p], by_dx);
      const float alpha = fminf(power_of_two(exponent), alpha_max);
      c.alpha[p] = exponent >= kLog2Cutoff ? alpha : 0.0f;
      c.t_before[p] = t[p];
      const float weight = c.alpha[p] * t[p], t_after = t[p] - weight;
      most = fmaxf(most, weight);
      // A pixel that the splat reaches but that would fall below the limit stops.
      c.goes_on[p] = t_after >= kTransmittanceStop;
      c.weight[p] = c.goes_on[p] ? weight : 0.0f;
      t[p] = c.goes_on[p] ? t_after : 0.0f;
    }
    c.reached = most > 0.0f;
    return c;
  }
};

// The words of a tile's hits: [group of 32 instances][quarter], and how many groups each quarter looked at.
struct TileHits {
  unsigned* words;
  int32_t* n_groups;  // [quarter]

  // Of any tile, behind the words of those before it: groups begin anew with each tile.
  __device__ static TileHits of(int32_t* hits, int64_t n_instances, int64_t n_tiles, int64_t tile, int64_t begin) {
    return {reinterpret_cast<unsigned*>(hits) + (begin / 32 + tile) * kQuarters,
            hits + (n_instances / 32 + n_tiles) * kQuarters + tile * kQuarters};
  }
};

struct Grid {
  int width, height;
  int tiles_x;
  int64_t n_tiles;

  static Grid of(const Camera& camera) {
    return {camera.width, camera.height, camera.tiles_x(), int64_t(camera.tiles_x()) * camera.tiles_y()};
  }
};

constexpr int kForwardThreads = 32 * kQuarters;
constexpr int kGroups = kForwardThreads / 32;  // of splats that are staged at once

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
      const float t_after = c.t_before[p] - c.weight[p];
      const bool is_median = c.t_before[p] >= kMedianTransmittance && t_after < kMedianTransmittance;
      expected[p] = fmaf(c.weight[p], z, expected[p]);
      median[p] = is_median ? z : median[p];
    }
  }
};

template <bool kDepth>
__global__ __launch_bounds__(kForwardThreads) void blend_kernel(const Splat* splats, Tiles tiles, Grid grid,
                                                                RasterSettings settings, DepthLimits depth_limits,
                                                                Late<Image> late_out) {
  __shared__ SplatRows staged[kForwardThreads];
  __shared__ unsigned reached[kGroups][kQuarters];  // which splats of a group can reach a quarter
  __shared__ int n_groups_of[kQuarters];
  const int lane = int(threadIdx.x % 32), quarter = int(threadIdx.x / 32);
  const int64_t tile = blockIdx.x;
  const int left = int(tile % grid.tiles_x) * kTileSize, top = int(tile / grid.tiles_x) * kTileSize;
  const int column = left + quarter % 2 * kQuarter + lane % kQuarter;
  const int row = top + quarter / 2 * kQuarter + lane / kQuarter;
  PixelPair pixels = PixelPair::at(column, row, grid.width, grid.height);
  float red[kPixels] = {}, green[kPixels] = {}, blue[kPixels] = {};
  float left_through[kPixels] = {1.0f, 1.0f};  // T, also of pixels that have stopped
  PairDepths pixel_depths = {};
  const Image out = late_out.get();

  const int64_t begin = tiles.offsets[tile], end = tiles.offsets[tile + 1];
  TileHits hits = TileHits::of(out.hits, tiles.n_instances, grid.n_tiles, tile, begin);
  int n_groups = 0;
  for (int64_t batch = begin; batch < end; batch += kForwardThreads) {
    if (__syncthreads_or(pixels.goes_on()) == 0) break;
    unsigned reaches = 0;
    if (batch + threadIdx.x < end) {
      const int32_t number = tiles.splat_from_instance[batch + threadIdx.x];
      const Splat splat = load_splat(splats + number);
      const StagedSplat seen = StagedSplat::of(splat, number, kSplatGradientStride);
      staged[threadIdx.x].set(seen, splat.depth);
      reaches = quarters_reached(splat, seen.log2_opacity, float(left), float(top));
    }
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) {
      const unsigned group = __ballot_sync(kAllLanes, (reaches >> q & 1u) != 0);
      if (lane == q) reached[quarter][q] = group;
    }
    __syncthreads();
    const int n = int(end - batch < kForwardThreads ? end - batch : kForwardThreads);
    for (int group = 0; 32 * group < n; ++group) {
      if (!__any_sync(kAllLanes, pixels.goes_on())) break;
      unsigned hit = 0;  // by this lane
      for (unsigned left_over = reached[group][quarter]; left_over != 0; left_over &= left_over - 1) {
        const int i = __ffs(int(left_over)) - 1;
        const StagedSplat s = staged[32 * group + i].get();
        const Contribution c = pixels.blend(s, settings.alpha_max);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          red[p] = fmaf(c.weight[p], s.red, red[p]);
          green[p] = fmaf(c.weight[p], s.green, green[p]);
          blue[p] = fmaf(c.weight[p], s.blue, blue[p]);
          left_through[p] = c.goes_on[p] ? pixels.t[p] : left_through[p];
        }
        if constexpr (kDepth) pixel_depths.add(c, staged[32 * group + i].depth());
        if (c.reached) hit |= 1u << i;
      }
      hit = warp_or(hit);
      if (out.hits != nullptr && lane == 0) hits.words[n_groups * kQuarters + quarter] = hit;
      ++n_groups;
    }
  }
  if (lane == 0) {
    if (out.hits != nullptr) hits.n_groups[quarter] = n_groups;
    n_groups_of[quarter] = n_groups;
  }
  const bool is_opaque = __syncthreads_or(pixels.goes_on()) == 0;
  if (threadIdx.x == 0) {
    const int most_groups = max(max(n_groups_of[0], n_groups_of[1]), max(n_groups_of[2], n_groups_of[3]));
    const int64_t n_seen = 32 * most_groups < end - begin ? 32 * most_groups : end - begin;
    const float last_depth = n_seen > 0 ? staged[(n_seen - 1) % kForwardThreads].depth() : 0.0f;
    set_limit(depth_limits, tile, is_opaque, last_depth, settings.near);
  }
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int own_row = row + p * kPixelDistance;
    if (column >= grid.width || own_row >= grid.height) continue;
    const int64_t at = int64_t(own_row) * grid.width + column;
    const float t = left_through[p];
    out.transmittance[at] = t;
    out.color[3 * at] = fmaf(t, settings.background[0], red[p]);
    out.color[3 * at + 1] = fmaf(t, settings.background[1], green[p]);
    out.color[3 * at + 2] = fmaf(t, settings.background[2], blue[p]);
    if constexpr (kDepth) {
      if (out.depth != nullptr) out.depth[at] = pixel_depths.expected[p];
      if (out.median_depth != nullptr) out.median_depth[at] = pixel_depths.median[p];
    }
  }
}

constexpr int kMomentCount = 9;
static_assert(kMomentCount == kSplatGradientStride, "a splat's row holds the moments first");
constexpr int kBackwardThreads = 64;
constexpr int kBackwardWarps = kBackwardThreads / 32;

// The gradient of the loss by a thread's pixels; kColumns says whether it sees the depth.
template <int kColumns>
struct PairGradient {
  static constexpr bool kDepth = has_depth(kColumns);
  float red[kPixels], green[kPixels], blue[kPixels];
  float depth[kDepth ? kPixels : 1];
  float total[kPixels];   // gradient . what is seen: colour and depth, and T by its own gradient
  float prefix[kPixels];  // gradient . colour and depth blended so far

  __device__ static PairGradient at(int column, int row, const Grid& grid, const Image& image, const Image& d_image) {
    PairGradient g = {};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int own_row = row + p * kPixelDistance;
      if (column >= grid.width || own_row >= grid.height) continue;
      const int64_t at = int64_t(own_row) * grid.width + column;
      g.red[p] = d_image.color[3 * at];
      g.green[p] = d_image.color[3 * at + 1];
      g.blue[p] = d_image.color[3 * at + 2];
      // The colour holds the background already, and what is behind it scales with T as the background does.
      g.total[p] =
          g.red[p] * image.color[3 * at] + g.green[p] * image.color[3 * at + 1] + g.blue[p] * image.color[3 * at + 2];
      if (d_image.transmittance != nullptr) g.total[p] += d_image.transmittance[at] * image.transmittance[at];
      if constexpr (kDepth) {
        g.depth[p] = d_image.depth[at];
        g.total[p] += d_image.depth[at] * image.depth[at];
      }
    }
    return g;
  }

  // The pixels' part of the sums that give a splat's gradient: of d, the gradient by the exponent of e, of its products
  // with dx, dy, dx^2, dx dy, dy^2, and of the gradients by the colour and the depth; and of the absolute gradients.
  __device__ void moments_of(const Contribution& c, const StagedSplat& s, float z, float alpha_max,
                             float moments[kColumns]) {
    float d[kPixels], d_dy[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float shade = fmaf(red[p], s.red, fmaf(green[p], s.green, blue[p] * s.blue));
      if constexpr (kDepth) shade = fmaf(depth[p], z, shade);
      prefix[p] = fmaf(c.weight[p], shade, prefix[p]);
      const float behind = (total[p] - prefix[p]) * reciprocal(1.0f - c.alpha[p]);
      const float d_exponent = fmaf(c.t_before[p], shade, -behind) * c.alpha[p];
      d[p] = c.goes_on[p] && c.alpha[p] < alpha_max ? d_exponent : 0.0f;
      d_dy[p] = d[p] * c.dy[p];
    }
    const float sum = d[0] + d[1], sum_dy = d_dy[0] + d_dy[1];
    const float sum_dydy = fmaf(d_dy[1], c.dy[1], d_dy[0] * c.dy[0]);
    moments[6] = fmaf(c.weight[1], red[1], c.weight[0] * red[0]);
    moments[7] = fmaf(c.weight[1], green[1], c.weight[0] * green[0]);
    moments[8] = fmaf(c.weight[1], blue[1], c.weight[0] * blue[0]);
    moments[0] = sum;
    moments[1] = sum * c.dx;
    moments[2] = sum_dy;
    moments[3] = moments[1] * c.dx;
    moments[4] = sum_dy * c.dx;
    moments[5] = sum_dydy;
    if constexpr (kDepth) moments[9] = fmaf(c.weight[1], depth[1], c.weight[0] * depth[0]);
    if constexpr (has_absolute(kColumns)) {
      float by_x = 0.0f, by_y = 0.0f;
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        by_x += fabsf(d[p] * fmaf(2.0f * s.a, c.dx, s.b * c.dy[p]));
        by_y += fabsf(d[p] * fmaf(2.0f * s.c, c.dy[p], s.b * c.dx));
      }
      moments[kColumns - 2] = by_x / kLog2E;
      moments[kColumns - 1] = by_y / kLog2E;
    }
  }
};

// Sums nine values over the lanes: with each exchange a lane keeps half of its values and gives the other half away, so
// that 12 shuffles do instead of 45. Returns sum `moment_of(lane)`.
__device__ int moment_of(int lane) {
  return (lane & 2) != 0 ? 8 : lane / 4;
}
__device__ float transposed_sum(const float v[kMomentCount], int lane) {
  const auto exchanged = [&](int is_upper, float lower, float upper, int distance) {
    return chosen(is_upper, upper, lower) + __shfl_xor_sync(kAllLanes, chosen(is_upper, lower, upper), distance);
  };
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = exchanged(lane & 16, v[i], v[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) two[i] = exchanged(lane & 8, four[i], four[i + 2], 8);
  float sum = exchanged(lane & 2, exchanged(lane & 4, two[0], two[1], 4), v[8], 2);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  float ninth = sum;  // of four lanes only, where it is the ninth
#pragma unroll
  for (int distance = 16; distance >= 4; distance /= 2) ninth += __shfl_xor_sync(kAllLanes, ninth, distance);
  return chosen(lane & 2, ninth, sum);
}

// What a warp needs of shared memory for the splats of a group that were hit.
template <int kColumns>
struct StagedHits {
  static constexpr bool kDepth = PairGradient<kColumns>::kDepth;
  SplatRows splats[32];
  float depths[kDepth ? 32 : 1];

  // Calls put(i, the i-th splat hit, its moments in this lane) for one after the other. `instances` are the group's.
  template <class Put>
  __device__ void visit(const Splat* from, const int32_t* instances, unsigned hit, float alpha_max, PixelPair& pixels,
                        PairGradient<kColumns>& gradient, Put&& put) {
    const int lane = int(threadIdx.x % 32);
    if ((hit >> lane & 1u) != 0) {
      const int32_t number = instances[lane];
      const Splat splat = load_splat(from + number);
      const int place = __popc(hit & ((1u << lane) - 1u));
      splats[place].set(StagedSplat::of(splat, number, kColumns));
      if constexpr (kDepth) depths[place] = splat.depth;
    }
    __syncwarp();
    const int n_hits = __popc(hit);
    for (int i = 0; i < n_hits; ++i) {
      const StagedSplat s = splats[i].get();
      const Contribution c = pixels.blend(s, alpha_max);
      float moments[kColumns];
      gradient.moments_of(c, s, kDepth ? depths[i] : 0.0f, alpha_max, moments);
      put(i, s, moments);
    }
    __syncwarp();
  }
};

template <int kColumns>
__global__ __launch_bounds__(kBackwardThreads) void blend_vjp_kernel(const Splat* splats, Tiles tiles, Grid grid,
                                                                     float alpha_max, Image image, Image d_image,
                                                                     float* moments_of) {
  __shared__ StagedHits<kColumns> staged_by_warp[kBackwardWarps];
  StagedHits<kColumns>& staged = staged_by_warp[threadIdx.x / 32];
  const int lane = int(threadIdx.x % 32);
  const int64_t share = int64_t(blockIdx.x) * kBackwardWarps + threadIdx.x / 32;  // a quarter of a tile
  const int64_t tile = share / kQuarters;
  const int quarter = int(share % kQuarters);
  const int64_t begin = tiles.offsets[tile];
  const TileHits hits = TileHits::of(image.hits, tiles.n_instances, grid.n_tiles, tile, begin);
  const int column = int(tile % grid.tiles_x) * kTileSize + quarter % 2 * kQuarter + lane % kQuarter;
  const int row = int(tile / grid.tiles_x) * kTileSize + quarter / 2 * kQuarter + lane / kQuarter;
  PixelPair pixels = PixelPair::at(column, row, grid.width, grid.height);
  auto gradient = PairGradient<kColumns>::at(column, row, grid, image, d_image);

  float* own_moment = moments_of + moment_of(lane);
  const bool adds = lane % 4 == 0 || lane == 2;
  const int n_groups = hits.n_groups[quarter];
  for (int group = 0; group < n_groups; ++group) {
    const unsigned hit = hits.words[group * kQuarters + quarter];
    if (hit == 0) continue;
    staged.visit(splats, tiles.splat_from_instance + begin + 32 * group, hit, alpha_max, pixels, gradient,
                 [&](int, const StagedSplat& s, const float* moments) {
                   const float sum = transposed_sum(moments, lane);
                   add_if(adds, own_moment + s.sums, sum);
#pragma unroll
                   for (int k = kMomentCount; k < kColumns; ++k) {
                     add_if(lane == 1, moments_of + s.sums + k, warp_sum(moments[k]));
                   }
                 });
  }
}

// As blend_vjp_kernel, but the four quarters of a tile go together, and leave their sums for each instance.
constexpr int kRecordingThreads = 32 * kQuarters;
template <int kColumns>
__global__ __launch_bounds__(kRecordingThreads) void record_sums_kernel(const Splat* splats, Tiles tiles, Grid grid,
                                                                        float alpha_max, Image image, Image d_image,
                                                                        InstanceSums out) {
  __shared__ StagedHits<kColumns> staged[kQuarters];
  __shared__ float sums[kQuarters][32][kColumns];  // of the splats hit, one behind the other
  __shared__ unsigned hit_of[kQuarters];
  const int lane = int(threadIdx.x % 32), quarter = int(threadIdx.x / 32);
  const int64_t tile = blockIdx.x, begin = tiles.offsets[tile];
  const TileHits hits = TileHits::of(image.hits, tiles.n_instances, grid.n_tiles, tile, begin);
  const int column = int(tile % grid.tiles_x) * kTileSize + quarter % 2 * kQuarter + lane % kQuarter;
  const int row = int(tile / grid.tiles_x) * kTileSize + quarter / 2 * kQuarter + lane / kQuarter;
  PixelPair pixels = PixelPair::at(column, row, grid.width, grid.height);
  auto gradient = PairGradient<kColumns>::at(column, row, grid, image, d_image);

  const bool holds = lane % 4 == 0 || lane == 2;
  int most_groups = 0;
  for (int q = 0; q < kQuarters; ++q) most_groups = max(most_groups, hits.n_groups[q]);
  for (int group = 0; group < most_groups; ++group) {
    const int64_t first = begin + 32 * group;
    const unsigned hit = group < hits.n_groups[quarter] ? hits.words[group * kQuarters + quarter] : 0;
    staged[quarter].visit(splats, tiles.splat_from_instance + first, hit, alpha_max, pixels, gradient,
                          [&](int i, const StagedSplat&, const float* moments) {
                            const float sum = transposed_sum(moments, lane);
                            if (holds) sums[quarter][i][moment_of(lane)] = sum;
#pragma unroll
                            for (int k = kMomentCount; k < kColumns; ++k) {
                              const float one_more = warp_sum(moments[k]);
                              if (lane == 1) sums[quarter][i][k] = one_more;
                            }
                          });
    if (lane == 0) hit_of[quarter] = hit;
    __syncthreads();
    const unsigned hit_by_any = hit_of[0] | hit_of[1] | hit_of[2] | hit_of[3];
    for (int i = int(threadIdx.x); i < 32 * kColumns; i += kRecordingThreads) {
      const int slot = i / kColumns;
      if ((hit_by_any >> slot & 1u) == 0) continue;
      float sum = 0.0f;
#pragma unroll
      for (int q = 0; q < kQuarters; ++q) {
        const int place = __popc(hit_of[q] & ((1u << slot) - 1u));
        if ((hit_of[q] >> slot & 1u) != 0) sum += sums[q][place][i - slot * kColumns];
      }
      out.rows[first * kColumns + i] = sum;
    }
    if (quarter == 0 && (hit_by_any >> lane & 1u) != 0) {
      out.splats[first + lane] = uint32_t(tiles.splat_from_instance[first + lane]);
      out.instances[first + lane] = int32_t(first + lane);
    }
    __syncthreads();
  }
}

// The gradient of each splat from the moments that its row holds, in place.
__global__ void splat_gradient_kernel(const Splat* splats, int64_t n, SplatGradient d_splats) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const Splat s = load_splat(splats + i);
  gradient_of_moments({s.a, s.b, s.c}, s.opacity, d_splats.rows + i * d_splats.n_columns);
}

}  // namespace
}  // namespace cuda

int64_t hits_size(const Cuda&, int64_t n_instances, const Camera& camera) {
  const int64_t n_tiles = cuda::Grid::of(camera).n_tiles;
  return (n_instances / 32 + 2 * n_tiles) * cuda::kQuarters;
}

void cuda::queue_blend(cudaStream_t stream, const Projected& projected, const Tiles& tiles, const Camera& camera,
                       const RasterSettings& settings, const DepthLimits& depth_limits, const Late<Image>& out) {
  const Grid grid = Grid::of(camera);
  const bool has_depth = out.value.depth != nullptr || out.value.median_depth != nullptr;
  const auto kernel = has_depth ? blend_kernel<true> : blend_kernel<false>;
  kernel<<<unsigned(grid.n_tiles), kForwardThreads, 0, stream>>>(projected.splats, tiles, grid, settings, depth_limits,
                                                                 out);
  check_launch("blend");
}

void blend(const Cuda& backend, const Projected& projected, const Tiles& tiles, const Camera& camera,
           const RasterSettings& settings, const Image& out) {
  const cuda::DepthLimits none = {cuda::Late<uint32_t*>(nullptr), nullptr};
  cuda::queue_blend(stream_of(backend), projected, tiles, camera, settings, none, cuda::Late<Image>(out));
}

size_t blend_vjp_scratch(const Cuda&, int64_t n_splats, int64_t n_instances, int n_columns,
                         const RasterSettings& settings) {
  if (!settings.deterministic) return 0;
  Arena arena(nullptr);
  cuda::InstanceSums::of(arena, n_instances, n_columns);
  return arena.used() + cuda::queued_add_up_scratch(n_splats, n_instances);
}

void cuda::queue_blend_vjp(cudaStream_t stream, const Projected& projected, const Tiles& tiles, const Camera& camera,
                           const RasterSettings& settings, const Image& image, const Image& d_image, void* memory,
                           const SplatGradient& moments) {
  const Grid grid = Grid::of(camera);
  for_columns(moments.n_columns, [&](auto columns) {
    if (settings.deterministic) {
      Arena arena(memory);
      const InstanceSums sums = InstanceSums::of(arena, tiles.n_instances, columns);
      queue_clear(stream, sums);
      record_sums_kernel<columns><<<unsigned(grid.n_tiles), kRecordingThreads, 0, stream>>>(
          projected.splats, tiles, grid, settings.alpha_max, image, d_image, sums);
      queue_add_up(stream, sums, projected.n, arena.take<char>(0), moments.rows);
    } else {
      blend_vjp_kernel<columns><<<unsigned(grid.n_tiles * kQuarters / kBackwardWarps), kBackwardThreads, 0, stream>>>(
          projected.splats, tiles, grid, settings.alpha_max, image, d_image, moments.rows);
    }
  });
  check_launch("blend'");
}

void blend_vjp(const Cuda& backend, const Projected& projected, const Tiles& tiles, const Camera& camera,
               const RasterSettings& settings, const Image& image, const Image& d_image, void* scratch,
               const SplatGradient& d_splats) {
  if (projected.n == 0) return;
  const cudaStream_t stream = stream_of(backend);
  const size_t n_bytes = size_t(projected.n) * size_t(d_splats.n_columns) * sizeof(float);
  check(cudaMemsetAsync(d_splats.rows, 0, n_bytes, stream), "blend'");
  cuda::queue_blend_vjp(stream, projected, tiles, camera, settings, image, d_image, scratch, d_splats);
  constexpr int kThreads = 256;
  cuda::splat_gradient_kernel<<<n_blocks_of(projected.n, kThreads), kThreads, 0, stream>>>(projected.splats,
                                                                                           projected.n, d_splats);
  check_launch("blend'");
}

}  // namespace spaceport
