// What blend and blend' on a GPU share: a warp has a quarter of a tile, 8x8 pixels, two a thread, and walks the tile's
// list from front to back on its own, all lanes on one splat. So a sum over the lanes belongs to one splat, and needs
// no knowledge of who takes part. Both passes go through `PixelPair::blend`: the backward replays exactly what the
// forward did.
#pragma once

#include "queued.cuh"

namespace spaceport {
namespace cuda {

constexpr int kQuarter = kTileSize / 2;  // pixels along it
constexpr int kQuarters = 4;
constexpr int kPixels = 2;         // of a thread, one above the other
constexpr int kPixelDistance = 4;  // rows between them

// Alpha is held in units so large that the cutoff is the smallest normal number: what lies below becomes zero of
// itself, with the exponential. T has a unit too, such that products of both, and reciprocals, are far from the ends of
// a float.
constexpr float kSmallestExponent = -126.0f;
constexpr float kAlphaUnit = 3.33610197e35f;  // 2^(kLog2Cutoff - kSmallestExponent)
constexpr float kTPerUnit = 5.76460752e17f;   // 2^59
constexpr float kWeightUnit = kAlphaUnit / kTPerUnit;

// As the special function unit gives them: of normal numbers, to about 2 units in the last place. The power is zero
// below kSmallestExponent.
__device__ inline float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float log2_of(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A splat as pixels see it: the exponent of alpha in its unit, in base 2, is (a dx + b dy) dx + c dy^2 + at_center.
struct StagedSplat {
  float x, y, a, b;
  float c, at_center, blue;
  uint32_t sums;  // where its sums begin, in floats
  float red_green[2];
};

// In shared memory: loads of sixteen bytes, which all lanes share, and one of eight.
struct SharedSplat {
  float4 rows[3];

  SharedSplat() = default;
  __device__ SharedSplat(const Splat& s, int32_t number, int n_columns) {
    rows[0] = make_float4(s.x, s.y, -0.5f * kLog2E * s.a, -kLog2E * s.b);
    rows[1] = make_float4(-0.5f * kLog2E * s.c, log2_of(s.opacity) - kLog2Cutoff + kSmallestExponent, s.blue,
                          __uint_as_float(uint32_t(number) * uint32_t(n_columns)));
    rows[2] = make_float4(s.red, s.green, s.green, s.red);
  }
  // Of an address in shared memory; the one of `red_green` is that of red and green, or of green and red.
  __device__ static StagedSplat load(uint32_t address, uint32_t red_green) {
    StagedSplat s;
    float sums;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(s.x), "=f"(s.y), "=f"(s.a), "=f"(s.b)
                 : "r"(address));
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + 16];"
                 : "=f"(s.c), "=f"(s.at_center), "=f"(s.blue), "=f"(sums)
                 : "r"(address));
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + 32];" : "=f"(s.red_green[0]), "=f"(s.red_green[1]) : "r"(red_green));
    s.sums = __float_as_uint(sums);
    return s;
  }
};

// Splats that a warp has taken into shared memory, close together.
template <bool kDepth>
struct StagedSplats {
  SharedSplat splats[32];
  float depths[kDepth ? 32 : 1];

  __device__ void set(int place, const SharedSplat& splat, float depth) {
    splats[place] = splat;
    if constexpr (kDepth) depths[place] = depth;
  }
  // Calls each(place, splat) for the first n, with green and red swapped or not.
  template <bool kIsSwapped, class Each>
  __device__ void visit(int n, bool is_swapped, Each&& each) const {
    uint32_t at = kept(uint32_t(__cvta_generic_to_shared(splats)));
    uint32_t red_green = kept(at + (is_swapped ? 8 : 0));
#pragma unroll 2
    for (int i = 0; i < n; ++i) {
      each(i, SharedSplat::load(at, kIsSwapped ? red_green : at));
      at += uint32_t(sizeof(SharedSplat));
      red_green += uint32_t(sizeof(SharedSplat));
    }
  }
  __device__ float depth(int place) const { return kDepth ? depths[place] : 0.0f; }
};

__device__ inline Splat load_splat(const Splat* from) {
  const float4* rows = reinterpret_cast<const float4*>(from);
  const float4 a = __ldg(rows), b = __ldg(rows + 1), c = __ldg(rows + 2);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}

// What blending one splat into a thread's pixels does; alpha, T and weights in their units.
struct Contribution {
  float dx;
  float dy[kPixels];
  float alpha[kPixels];     // zero where the splat does not reach
  float weight[kPixels];    // alpha * T, zero where the pixel does not take part
  float t_before[kPixels];  // T in front of the splat, and behind it if the pixel takes part
  float t_after[kPixels];
  bool reached;  // some pixel, if only to stop it
};

struct PixelPair {
  float x, y;         // centre of the upper one
  float t[kPixels];   // transmittance in its unit; negative once the pixel has stopped, or if it lies outside the image
  float alpha_limit;  // in its unit

  __device__ static PixelPair at(int column, int row, int width, int height, float alpha_max) {
    PixelPair pair = {float(column) + 0.5f, float(row) + 0.5f, {}, alpha_max * (1.0f / kAlphaUnit)};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      pair.t[p] = column < width && row + p * kPixelDistance < height ? kTPerUnit : -kTPerUnit;
    }
    return pair;
  }
  __device__ bool goes_on() const { return fmaxf(t[0], t[1]) > 0.0f; }

  __device__ Contribution blend(const StagedSplat& s) {
    Contribution c;
    c.dx = x - s.x;
    const float by_dx = fmaf(s.a * c.dx, c.dx, s.at_center), b_dx = s.b * c.dx;
    float reach[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      c.dy[p] = y + float(p * kPixelDistance) - s.y;
      c.alpha[p] = fminf(power_of_two(fmaf(fmaf(s.c, c.dy[p], b_dx), c.dy[p], by_dx)), alpha_limit);
      reach[p] = c.alpha[p] * t[p];
      c.t_before[p] = t[p];
      c.t_after[p] = fmaf(-kAlphaUnit, reach[p], t[p]);
      // A pixel that the splat reaches but that would fall below the limit stops.
      const bool goes_on = c.t_after[p] >= kTransmittanceStop * kTPerUnit;
      c.weight[p] = goes_on ? reach[p] : 0.0f;
      t[p] = goes_on ? c.t_after[p] : -fabsf(t[p]);
    }
    c.reached = fmaxf(reach[0], reach[1]) > 0.0f;
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

struct TileGrid {
  int width, height;
  int tiles_x;
  int64_t n_tiles;

  static TileGrid of(const Camera& camera) {
    return {camera.width, camera.height, camera.tiles_x(), int64_t(camera.tiles_x()) * camera.tiles_y()};
  }
};

// A quarter of a tile, and the upper of a lane's pixels in it.
struct Quarter {
  int left, top;
  int column, row;

  __device__ static Quarter of(const TileGrid& grid, int64_t tile, int quarter) {
    const int lane = int(threadIdx.x % 32);
    const int left = int(tile % grid.tiles_x) * kTileSize + quarter % 2 * kQuarter;
    const int top = int(tile / grid.tiles_x) * kTileSize + quarter / 2 * kQuarter;
    return {left, top, left + lane % kQuarter, top + lane / kQuarter};
  }
  __device__ PixelPair pixels(const TileGrid& grid, float alpha_max) const {
    return PixelPair::at(column, row, grid.width, grid.height, alpha_max);
  }
};

}  // namespace cuda
}  // namespace spaceport
