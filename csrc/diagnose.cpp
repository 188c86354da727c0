// The work that a blend holds, counted by plain scalar code.
#include "diagnose.h"

#include <cmath>
#include <vector>

namespace spaceport {

namespace {

// The pairs of one pixel: how far it walks its tile's list, and how many splats it blends on the way.
PairCounts count_pixel(const Projected& projected, const int32_t* instances, int64_t n, float x, float y,
                       const RasterSettings& settings) {
  PairCounts counts = {0, 0};
  float t = 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    const Splat& s = projected.splats[instances[i]];
    const float dx = x - s.x, dy = y - s.y;
    ++counts.evaluated;
    const float alpha =
        std::fmin(settings.alpha_max, s.opacity * std::exp(-0.5f * (s.a * dx * dx + s.c * dy * dy) - s.b * dx * dy));
    if (!(alpha >= kAlphaCutoff)) continue;
    if (t * (1.0f - alpha) < kTransmittanceStop) break;
    t *= 1.0f - alpha;
    ++counts.blended;
  }
  return counts;
}

}  // namespace

PairCounts count_pairs(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
                       const RasterSettings& settings) {
  const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
  std::vector<PairCounts> counts(static_cast<size_t>(n_tiles), PairCounts{0, 0});
  parallel_for(*cpu.pool, n_tiles, [&](int64_t tile) {
    const int x0 = int(tile % camera.tiles_x()) * kTileSize, y0 = int(tile / camera.tiles_x()) * kTileSize;
    const int64_t begin = tiles.offsets[tile], n = tiles.offsets[tile + 1] - begin;
    for (int y = y0; y < y0 + kTileSize && y < camera.height; ++y) {
      for (int x = x0; x < x0 + kTileSize && x < camera.width; ++x) {
        const PairCounts pixel =
            count_pixel(projected, tiles.splat_from_instance + begin, n, float(x) + 0.5f, float(y) + 0.5f, settings);
        counts[size_t(tile)].evaluated += pixel.evaluated;
        counts[size_t(tile)].blended += pixel.blended;
      }
    }
  });
  PairCounts total = {0, 0};
  for (const PairCounts& c : counts) {
    total.evaluated += c.evaluated;
    total.blended += c.blended;
  }
  return total;
}

}  // namespace spaceport
