// blend': a warp for each quarter of a tile, on its own (pixels.cuh). It visits the splats that blend noted as reached.
// The colour behind a splat is the final colour less the prefix up to it, so that nothing is recovered by division but
// what the splat itself let through.
//
// Warps add what they find to the splats' sums as they come to it, in no fixed order. Where the order is to be fixed,
// they leave the sums of each instance instead (instance_sums.cuh).
#define SPACEPORT_ISA cuda

#include "instance_sums.cuh"
#include "pixels.cuh"

namespace spaceport {
namespace cuda {

namespace {

// condition ? a : b, as one instruction: the compiler makes branches of pairs of these.
__device__ float chosen(int condition, float a, float b) {
  float result;
  asm("{.reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p;}" : "=f"(result) : "f"(a), "f"(b), "r"(condition));
  return result;
}

// Adds to a float in global memory, in the lanes where the condition holds.
__device__ void add_if(int condition, float* to, float value) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %2, 0; @p red.global.add.f32 [%0], %1;}" ::"l"(__cvta_generic_to_global(to)),
      "f"(value), "r"(condition)
      : "memory");
}

constexpr int kMomentCount = 9;
static_assert(kMomentCount == kSplatGradientStride, "a splat's row holds the moments first");
constexpr int kThreads = 64;
constexpr int kWarps = kThreads / 32;

// Lanes of the lower half of a warp see red and green in this order, those of the upper half in the other: see
// `sum_of_moments`.
__device__ int is_swapped(int lane) {
  return lane & 16;
}

// A thread's part of the sums that give a splat's gradient: of d, the gradient by the exponent of e, and of its
// products with dy and dy^2; and of the gradients by the colour. The products with dx come when the columns of pixels
// are summed.
struct PairMoments {
  float d, d_dy, d_dydy;
  float red_green[2], blue;
};

// The gradient of the loss by a thread's pixels; kColumns says whether it sees the depth.
template <int kColumns>
struct PairGradient {
  static constexpr bool kDepth = has_depth(kColumns);
  float red_green[2][kPixels], blue[kPixels];
  float depth[kDepth ? kPixels : 1];
  float total[kPixels];   // gradient . what is seen: colour and depth, and T by its own gradient; in T's unit
  float prefix[kPixels];  // gradient . colour and depth blended so far, in the unit of weights

  __device__ static PairGradient at(const Quarter& quarter, const TileGrid& grid, const Image& image,
                                    const Image& d_image) {
    PairGradient g = {};
    const int swapped = is_swapped(int(threadIdx.x % 32));
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int row = quarter.row + p * kPixelDistance;
      if (quarter.column >= grid.width || row >= grid.height) continue;
      const int64_t at = int64_t(row) * grid.width + quarter.column;
      const float red = d_image.color[3 * at], green = d_image.color[3 * at + 1], blue = d_image.color[3 * at + 2];
      g.red_green[0][p] = swapped != 0 ? green : red;
      g.red_green[1][p] = swapped != 0 ? red : green;
      g.blue[p] = blue;
      // The colour holds the background already, and what is behind it scales with T as the background does.
      g.total[p] = red * image.color[3 * at] + green * image.color[3 * at + 1] + blue * image.color[3 * at + 2];
      if (d_image.transmittance != nullptr) g.total[p] += d_image.transmittance[at] * image.transmittance[at];
      if constexpr (kDepth) {
        g.depth[p] = d_image.depth[at];
        g.total[p] += d_image.depth[at] * image.depth[at];
      }
      g.total[p] *= kTPerUnit;
    }
    return g;
  }

  // `others`: the part of columns behind the moments.
  __device__ PairMoments moments_of(const Contribution& c, const PixelPair& pixels, const StagedSplat& s, float z,
                                    float* others) {
    float d[kPixels], d_dy[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float shade = fmaf(red_green[0][p], s.red_green[0], fmaf(red_green[1][p], s.red_green[1], blue[p] * s.blue));
      if constexpr (kDepth) shade = fmaf(depth[p], z, shade);
      prefix[p] = fmaf(c.weight[p], shade, prefix[p]);
      // alpha / (1 - alpha) of what is behind is weight / T behind the splat.
      const float behind = fmaf(kAlphaUnit, prefix[p], -total[p]);
      const float by_weight = fmaf(behind, reciprocal(pixels.t[p]), shade);
      d[p] = c.alpha[p] < pixels.alpha_limit ? c.weight[p] * by_weight : 0.0f;
      d_dy[p] = d[p] * c.dy[p];
    }
    if constexpr (kDepth) others[0] = kWeightUnit * fmaf(c.weight[1], depth[1], c.weight[0] * depth[0]);
    if constexpr (has_absolute(kColumns)) {
      float by_x = 0.0f, by_y = 0.0f;
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        by_x += fabsf(d[p] * fmaf(2.0f * s.a, c.dx, s.b * c.dy[p]));
        by_y += fabsf(d[p] * fmaf(2.0f * s.c, c.dy[p], s.b * c.dx));
      }
      others[kDepth] = by_x * (kWeightUnit / kLog2E);
      others[kDepth + 1] = by_y * (kWeightUnit / kLog2E);
    }
    return {d[0] + d[1],
            d_dy[0] + d_dy[1],
            fmaf(d_dy[1], c.dy[1], d_dy[0] * c.dy[0]),
            {fmaf(c.weight[1], red_green[0][1], c.weight[0] * red_green[0][0]),
             fmaf(c.weight[1], red_green[1][1], c.weight[0] * red_green[1][0])},
            fmaf(c.weight[1], blue[1], c.weight[0] * blue[0])};
  }
};

// Which of a splat's moments `sum_of_moments` leaves in a lane; -1: none.
__device__ int moment_of(int lane) {
  constexpr unsigned long long kOfEvenLanes = 0xff87f4f2ff56f130ull;  // four bits each
  const int moment = int(kOfEvenLanes >> (lane / 2 * 4) & 15);
  return lane % 2 == 0 && moment < kMomentCount ? moment : -1;
}

// Sums over the lanes: with an exchange a lane keeps one of two values and gives the other away, so that their number
// shrinks with the distance. First over the pixels of a column, six values, then over the columns, nine: dx is the same
// in each.
__device__ float sum_of_moments(const PairMoments& m, float dx, int lane) {
  const auto given = [](float value, int distance) { return __shfl_xor_sync(kAllLanes, value, distance); };
  const auto exchanged = [&](int is_upper, float lower, float upper, int distance) {
    return chosen(is_upper, upper, lower) + given(chosen(is_upper, lower, upper), distance);
  };
  const float d = exchanged(lane & 16, m.d, m.d_dy, 16);           // of d; d dy
  const float color = m.red_green[0] + given(m.red_green[1], 16);  // of red; green
  float third = exchanged(lane & 16, m.d_dydy, m.blue, 16);        // of d dy^2; blue
  const float first = exchanged(lane & 8, d, color, 8);            // d, red; d dy, green
  third += given(third, 8);
  const float second = first * dx;
  third = chosen(lane & 8, third, second * dx);  // d dx^2, d dy^2; -, blue
  const float sum = exchanged(lane & 4, first, second, 4);
  third += given(third, 4);
  const float one = exchanged(lane & 2, sum, third, 2);
  return kWeightUnit * (one + given(one, 1));
}

// Calls put(i, the i-th splat hit, its sum of `moment_of` this lane, this thread's part of other columns) for one after
// the other. `instances` are a group's.
template <int kColumns, class Put>
__device__ void visit(StagedSplats<has_depth(kColumns)>& staged, const Splat* splats, const int32_t* instances,
                      unsigned word, PixelPair& pixels, PairGradient<kColumns>& gradient, Put&& put) {
  const int lane = int(kept(threadIdx.x % 32));
  const bool takes = (word >> lane & 1u) != 0;
  const unsigned hit = __ballot_sync(kAllLanes, takes);  // the word again, but now the compiler knows that lanes agree
  if (takes) {
    const int32_t number = instances[lane];
    const Splat splat = load_splat(splats + number);
    staged.set(__popc(hit & ((1u << lane) - 1u)), SharedSplat(splat, number, kColumns), splat.depth);
  }
  __syncwarp();
  staged.template visit<true>(__popc(hit), is_swapped(lane) != 0, [&](int i, const StagedSplat& s) {
    const Contribution c = pixels.blend(s);
    float others[kColumns > kMomentCount ? kColumns - kMomentCount : 1];
    const PairMoments moments = gradient.moments_of(c, pixels, s, staged.depth(i), others);
    put(i, s, sum_of_moments(moments, c.dx, lane), others);
  });
  __syncwarp();
}

template <int kColumns>
__global__ __launch_bounds__(kThreads, at_least(kColumns == kMomentCount ? 20 : 16, kThreads)) void blend_vjp_kernel(
    const Splat* splats, Tiles tiles, TileGrid grid, float alpha_max, Image image, Image d_image, float* moments_of) {
  __shared__ StagedSplats<has_depth(kColumns)> staged[kWarps];
  const int lane = int(threadIdx.x % 32);
  const int64_t share = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;  // a quarter of a tile
  const int64_t tile = share / kQuarters;
  const int number_of_quarter = int(share % kQuarters);
  const int64_t begin = tiles.offsets[tile];
  const TileHits hits = TileHits::of(image.hits, tiles.n_instances, grid.n_tiles, tile, begin);
  const Quarter quarter = Quarter::of(grid, tile, number_of_quarter);
  PixelPair pixels = quarter.pixels(grid, alpha_max);
  auto gradient = PairGradient<kColumns>::at(quarter, grid, image, d_image);

  const int moment = moment_of(lane);
  float* own_moment = kept(moments_of + moment);
  const uint32_t adds = kept(moment >= 0);
  const int n_groups = hits.n_groups[number_of_quarter];
  for (int group = 0; group < n_groups; ++group) {
    const unsigned hit = hits.words[group * kQuarters + number_of_quarter];
    if (hit == 0) continue;
    visit(staged[threadIdx.x / 32], splats, tiles.splat_from_instance + begin + 32 * group, hit, pixels, gradient,
          [&](int, const StagedSplat& s, float sum, const float* others) {
            add_if(int(adds), own_moment + s.sums, sum);
#pragma unroll
            for (int k = kMomentCount; k < kColumns; ++k) {
              add_if(lane == 1, moments_of + s.sums + k, warp_sum(others[k - kMomentCount]));
            }
          });
  }
}

// As blend_vjp_kernel, but the four quarters of a tile go together, and leave their sums for each instance.
constexpr int kRecordingThreads = 32 * kQuarters;
template <int kColumns>
__global__ __launch_bounds__(kRecordingThreads) void record_sums_kernel(const Splat* splats, Tiles tiles, TileGrid grid,
                                                                        float alpha_max, Image image, Image d_image,
                                                                        InstanceSums out) {
  __shared__ StagedSplats<has_depth(kColumns)> staged[kQuarters];
  __shared__ float sums[kQuarters][32][kColumns];  // of the splats hit, one behind the other
  __shared__ unsigned hit_of[kQuarters];
  const int lane = int(threadIdx.x % 32), number_of_quarter = int(threadIdx.x / 32);
  const int64_t tile = blockIdx.x, begin = tiles.offsets[tile];
  const TileHits hits = TileHits::of(image.hits, tiles.n_instances, grid.n_tiles, tile, begin);
  const Quarter quarter = Quarter::of(grid, tile, number_of_quarter);
  PixelPair pixels = quarter.pixels(grid, alpha_max);
  auto gradient = PairGradient<kColumns>::at(quarter, grid, image, d_image);

  const int moment = int(kept(uint32_t(moment_of(lane))));
  int most_groups = 0;
  for (int q = 0; q < kQuarters; ++q) most_groups = max(most_groups, hits.n_groups[q]);
  for (int group = 0; group < most_groups; ++group) {
    const int64_t first = begin + 32 * group;
    const bool is_seen = group < hits.n_groups[number_of_quarter];
    const unsigned hit = is_seen ? hits.words[group * kQuarters + number_of_quarter] : 0;
    visit(staged[number_of_quarter], splats, tiles.splat_from_instance + first, hit, pixels, gradient,
          [&](int i, const StagedSplat&, float sum, const float* others) {
            if (moment >= 0) sums[number_of_quarter][i][moment] = sum;
#pragma unroll
            for (int k = kMomentCount; k < kColumns; ++k) {
              const float one_more = warp_sum(others[k - kMomentCount]);
              if (lane == 1) sums[number_of_quarter][i][k] = one_more;
            }
          });
    if (lane == 0) hit_of[number_of_quarter] = hit;
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
    if (number_of_quarter == 0 && (hit_by_any >> lane & 1u) != 0) {
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
  const TileGrid grid = TileGrid::of(camera);
  for_columns(moments.n_columns, [&](auto columns) {
    if (settings.deterministic) {
      Arena arena(memory);
      const InstanceSums sums = InstanceSums::of(arena, tiles.n_instances, columns);
      queue_clear(stream, sums);
      record_sums_kernel<columns><<<unsigned(grid.n_tiles), kRecordingThreads, 0, stream>>>(
          projected.splats, tiles, grid, settings.alpha_max, image, d_image, sums);
      queue_add_up(stream, sums, projected.n, arena.take<char>(0), moments.rows);
    } else {
      blend_vjp_kernel<columns><<<unsigned(grid.n_tiles * kQuarters / kWarps), kThreads, 0, stream>>>(
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
