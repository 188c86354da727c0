// blend: a block a tile. Forward one thread a pixel, in warps of 8x4; backward one warp for 8x8 pixels, two a thread.
//
// Both walk the tile's list from front to back: 32 splats at a time are tested against the warp's pixels, one a lane,
// and only those that can reach them are looked at by all lanes together. So a sum over the lanes belongs to one splat,
// and needs no knowledge of who takes part. Forward and backward share `Pixel::blend`, so that the backward replays
// exactly what the forward did; the colour behind a splat is the final colour less the prefix up to it, without a
// division to recover T.
#include "launch.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// A splat as pixels see it: the exponent of alpha in base 2 is (a dx + b dy) dx + c dy^2 + log2(opacity).
struct StagedSplat {
  float x, y, a, b, c, log2_opacity, red, green, blue;
  float extent_x, extent_y;
  int32_t number;  // row of the splat

  __device__ static StagedSplat of(const Splat& s, int32_t number) {
    return {
        s.x,    s.y,        -0.5f * kLog2E * s.a, -kLog2E * s.b, -0.5f * kLog2E * s.c, log2f(s.opacity), s.red, s.green,
        s.blue, s.extent_x, s.extent_y,           number};
  }
  // Whether pixel centres between the two corners may lie within its reach.
  __device__ bool reaches(float left, float top, float right, float bottom) const {
    return x + extent_x >= left && x - extent_x <= right && y + extent_y >= top && y - extent_y <= bottom;
  }
};

__device__ Splat load_splat(const Splat* from) {
  const float4* rows = reinterpret_cast<const float4*>(from);
  const float4 a = __ldg(rows), b = __ldg(rows + 1), c = __ldg(rows + 2);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}

// What blending one splat into a pixel does.
struct Contribution {
  float dx, dy;
  float alpha;
  float weight;    // alpha * T, zero where the pixel does not take part
  float t_before;  // T in front of the splat
  bool takes_part;
};

struct Pixel {
  float x, y;  // of its centre
  float t;     // transmittance; carries a minus sign once the pixel has stopped, or if it lies outside the image

  __device__ bool goes_on() const { return t > 0.0f; }
  __device__ Contribution blend(const StagedSplat& s, float alpha_max) {
    Contribution c;
    c.dx = x - s.x;
    c.dy = y - s.y;
    const float exponent = fmaf(fmaf(s.a, c.dx, s.b * c.dy), c.dx, fmaf(s.c * c.dy, c.dy, s.log2_opacity));
    c.t_before = t;
    c.alpha = fminf(exp2f(exponent), alpha_max);
    c.weight = c.alpha * t;
    const float t_after = t - c.weight;
    const bool reached = exponent >= kLog2Cutoff && goes_on();
    c.takes_part = reached && t_after >= kTransmittanceStop;
    // A pixel that the splat reaches but that would fall below the limit stops.
    t = c.takes_part ? t_after : reached ? -t : t;
    if (!c.takes_part) c.weight = 0.0f;
    return c;
  }
};

// Stages the block's share of the list from `begin` on: one splat a thread.
__device__ void stage(const Splat* splats, const Instance* instances, int64_t begin, int64_t end, StagedSplat* staged) {
  const int64_t i = begin + threadIdx.x;
  if (i < end) {
    const int32_t number = instances[i].splat;
    staged[threadIdx.x] = StagedSplat::of(load_splat(splats + number), number);
  }
}

constexpr int kForwardThreads = kTileSize * kTileSize;

__global__ __launch_bounds__(kForwardThreads) void blend_kernel(const Splat* splats, Tiles tiles, int width, int height,
                                                                int tiles_x, RasterSettings settings, Image out) {
  __shared__ StagedSplat staged[kForwardThreads];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int left = int(blockIdx.x) % tiles_x * kTileSize + warp % 2 * 8;
  const int top = int(blockIdx.x) / tiles_x * kTileSize + warp / 2 * 4;
  const int column = left + lane % 8, row = top + lane / 8;
  const bool is_inside = column < width && row < height;
  Pixel pixel = {float(column) + 0.5f, float(row) + 0.5f, is_inside ? 1.0f : -1.0f};
  float red = 0.0f, green = 0.0f, blue = 0.0f;

  const int64_t begin = tiles.offsets[blockIdx.x], end = tiles.offsets[blockIdx.x + 1];
  for (int64_t batch = begin; batch < end; batch += kForwardThreads) {
    if (__syncthreads_or(pixel.goes_on()) == 0) break;
    stage(splats, tiles.instances, batch, end, staged);
    __syncthreads();
    const int n = int(end - batch < kForwardThreads ? end - batch : kForwardThreads);
    for (int first = 0; first < n; first += 32) {
      if (!__any_sync(kAllLanes, pixel.goes_on())) break;
      const bool is_near = first + lane < n && staged[first + lane].reaches(float(left) + 0.5f, float(top) + 0.5f,
                                                                            float(left) + 7.5f, float(top) + 3.5f);
      for (unsigned left_over = __ballot_sync(kAllLanes, is_near); left_over != 0; left_over &= left_over - 1) {
        const StagedSplat& s = staged[first + __ffs(int(left_over)) - 1];
        const Contribution c = pixel.blend(s, settings.alpha_max);
        red = fmaf(c.weight, s.red, red);
        green = fmaf(c.weight, s.green, green);
        blue = fmaf(c.weight, s.blue, blue);
      }
    }
  }
  if (!is_inside) return;
  const int64_t at = int64_t(row) * width + column;
  const float t = fabsf(pixel.t);
  out.transmittance[at] = t;
  out.color[3 * at] = fmaf(t, settings.background[0], red);
  out.color[3 * at + 1] = fmaf(t, settings.background[1], green);
  out.color[3 * at + 2] = fmaf(t, settings.background[2], blue);
}

constexpr int kMomentCount = 9;
static_assert(kMomentCount == kSplatGradientStride, "a splat's row holds the moments first");
constexpr int kBackwardThreads = 128;
constexpr int kPixelsPerThread = 2;

// A pixel with the gradient of the loss by it.
struct PixelGradient {
  Pixel pixel;
  float red, green, blue;
  float total;   // gradient . what is seen: colour, and T by its own gradient
  float prefix;  // gradient . colour blended so far

  __device__ static PixelGradient of(int column, int row, int width, int height, const Image& image,
                                     const Image& d_image) {
    PixelGradient p = {{float(column) + 0.5f, float(row) + 0.5f, -1.0f}, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    if (column >= width || row >= height) return p;
    const int64_t at = int64_t(row) * width + column;
    p.pixel.t = 1.0f;
    p.red = d_image.color[3 * at];
    p.green = d_image.color[3 * at + 1];
    p.blue = d_image.color[3 * at + 2];
    // The colour holds the background already, and what is behind it scales with T as the background does.
    p.total = p.red * image.color[3 * at] + p.green * image.color[3 * at + 1] + p.blue * image.color[3 * at + 2] +
              d_image.transmittance[at] * image.transmittance[at];
    return p;
  }

  // Adds the pixel's part to the sums that give a splat's gradient: of d, the gradient by the exponent of e, of its
  // products with dx, dy, dx^2, dx dy, dy^2, and of the gradients by the colour. Returns whether there was one.
  __device__ bool add_to(float moments[kMomentCount], const StagedSplat& s, float alpha_max) {
    const Contribution c = pixel.blend(s, alpha_max);
    if (!c.takes_part) return false;
    const float shade = fmaf(red, s.red, fmaf(green, s.green, blue * s.blue));
    prefix = fmaf(c.weight, shade, prefix);
    const float behind = __fdividef(total - prefix, 1.0f - c.alpha);
    const float d = c.alpha < alpha_max ? (c.t_before * shade - behind) * c.alpha : 0.0f;
    const float d_dx = d * c.dx, d_dy = d * c.dy;
    moments[0] += d;
    moments[1] += d_dx;
    moments[2] += d_dy;
    moments[3] = fmaf(d_dx, c.dx, moments[3]);
    moments[4] = fmaf(d_dx, c.dy, moments[4]);
    moments[5] = fmaf(d_dy, c.dy, moments[5]);
    moments[6] = fmaf(c.weight, red, moments[6]);
    moments[7] = fmaf(c.weight, green, moments[7]);
    moments[8] = fmaf(c.weight, blue, moments[8]);
    return true;
  }
};

// Sums nine values over the lanes: with each exchange a lane keeps half of its values and gives the other half away, so
// that 14 shuffles do instead of 45. Returns sum `lane / 4` in every lane, and sum 8 through `last`.
__device__ float transposed_sum(float v[kMomentCount], int lane, float& last) {
#pragma unroll
  for (int kept = 4; kept >= 1; kept /= 2) {
    const int distance = 4 * kept;  // 16, 8, 4
    const bool is_upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float given = is_upper ? v[i] : v[i + kept];
      const float own = is_upper ? v[i + kept] : v[i];
      v[i] = own + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
  float sum = v[0];
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  last = v[8];
#pragma unroll
  for (int distance = 16; distance >= 1; distance /= 2) last += __shfl_xor_sync(kAllLanes, last, distance);
  return sum;
}

__global__ __launch_bounds__(kBackwardThreads) void blend_vjp_kernel(const Splat* splats, Tiles tiles, int width,
                                                                     int height, int tiles_x, float alpha_max,
                                                                     Image image, Image d_image, float* moments_of) {
  __shared__ StagedSplat staged[kBackwardThreads];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int left = int(blockIdx.x) % tiles_x * kTileSize + warp % 2 * 8;
  const int top = int(blockIdx.x) / tiles_x * kTileSize + warp / 2 * 8;
  PixelGradient pixels[kPixelsPerThread];
#pragma unroll
  for (int p = 0; p < kPixelsPerThread; ++p) {
    pixels[p] = PixelGradient::of(left + lane % 8, top + lane / 8 + 4 * p, width, height, image, d_image);
  }
  const auto goes_on = [&] { return pixels[0].pixel.goes_on() || pixels[1].pixel.goes_on(); };

  const int64_t begin = tiles.offsets[blockIdx.x], end = tiles.offsets[blockIdx.x + 1];
  for (int64_t batch = begin; batch < end; batch += kBackwardThreads) {
    if (__syncthreads_or(goes_on()) == 0) break;
    stage(splats, tiles.instances, batch, end, staged);
    __syncthreads();
    const int n = int(end - batch < kBackwardThreads ? end - batch : kBackwardThreads);
    for (int first = 0; first < n; first += 32) {
      if (!__any_sync(kAllLanes, goes_on())) break;
      const bool is_near = first + lane < n && staged[first + lane].reaches(float(left) + 0.5f, float(top) + 0.5f,
                                                                            float(left) + 7.5f, float(top) + 7.5f);
      for (unsigned left_over = __ballot_sync(kAllLanes, is_near); left_over != 0; left_over &= left_over - 1) {
        const StagedSplat& s = staged[first + __ffs(int(left_over)) - 1];
        float moments[kMomentCount] = {};
        bool takes_part = false;
#pragma unroll
        for (int p = 0; p < kPixelsPerThread; ++p) takes_part |= pixels[p].add_to(moments, s, alpha_max);
        if (!__any_sync(kAllLanes, takes_part)) continue;
        float last;
        const float sum = transposed_sum(moments, lane, last);
        float* row = moments_of + int64_t(s.number) * kMomentCount;
        if (lane % 4 == 0) atomicAdd(row + lane / 4, sum);
        if (lane == 1) atomicAdd(row + 8, last);
      }
    }
  }
}

// The gradient of each splat from the moments that its row holds, in place.
__global__ void splat_gradient_kernel(const Splat* splats, int64_t n, float* rows) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const Splat s = load_splat(splats + i);
  float* row = rows + i * kMomentCount;
  const float m[6] = {row[0], row[1], row[2], row[3], row[4], row[5]};
  row[0] = s.a * m[1] + s.b * m[2];
  row[1] = s.b * m[1] + s.c * m[2];
  row[2] = -0.5f * m[3];
  row[3] = -m[4];
  row[4] = -0.5f * m[5];
  row[5] = m[0] / s.opacity;
}

}  // namespace
}  // namespace cuda

void blend(const Cuda& backend, const Projected& projected, const Tiles& tiles, const Camera& camera,
           const RasterSettings& settings, const Image& out) {
  cuda::blend_kernel<<<unsigned(camera.tiles_x() * camera.tiles_y()), cuda::kForwardThreads, 0, stream_of(backend)>>>(
      projected.splats, tiles, camera.width, camera.height, camera.tiles_x(), settings, out);
  check_launch("blend");
}

size_t blend_vjp_scratch(const Cuda&, int64_t) {
  return 0;
}

void blend_vjp(const Cuda& backend, const Projected& projected, const Tiles& tiles, const Camera& camera,
               const RasterSettings& settings, const Image& image, const Image& d_image, void*, float* d_splats) {
  if (projected.n == 0) return;
  const cudaStream_t stream = stream_of(backend);
  check(cudaMemsetAsync(d_splats, 0, size_t(projected.n) * kSplatGradientStride * sizeof(float), stream), "blend'");
  cuda::blend_vjp_kernel<<<unsigned(camera.tiles_x() * camera.tiles_y()), cuda::kBackwardThreads, 0, stream>>>(
      projected.splats, tiles, camera.width, camera.height, camera.tiles_x(), settings.alpha_max, image, d_image,
      d_splats);
  constexpr int kThreads = 256;
  cuda::splat_gradient_kernel<<<n_blocks_of(projected.n, kThreads), kThreads, 0, stream>>>(projected.splats,
                                                                                           projected.n, d_splats);
  check_launch("blend'");
}

}  // namespace spaceport
