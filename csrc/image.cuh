// An image as it is queued: project, tile and blend, of splats that lie at the rows of their Gaussians.
#pragma once

#include <algorithm>

#include "queued.cuh"

namespace spaceport {
namespace cuda {

struct ImageScratch {
  char* zeros;  // what must be zero at the start of an image
  size_t n_zeros;
  TileState tile;
  ProjectedCounts* counts;
  uint32_t* is_undone;  // see DepthLimits
  int* n_contributing;  // see UpdateRule
  void* work;           // tile's, and of whoever needs some between two images
  Projected projected;
  Tiles tiles;

  static ImageScratch of(Arena& arena, const StepSize& size, size_t least_work) {
    const Camera camera = camera_of(size);
    const int64_t n = size.n_gaussians, n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
    ImageScratch s = {};
    s.zeros = arena.take<char>(0);
    s.tile = TileState::of(arena, n, size.n_instances, camera);
    s.counts = arena.take<ProjectedCounts>(1);
    s.is_undone = arena.take<uint32_t>(1);
    s.n_contributing = arena.take<int>(1);
    s.n_zeros = arena.used();
    s.work = arena.take<char>(int64_t(std::max(queued_tile_scratch(n, size.n_instances, camera), least_work)));
    s.projected = {arena.take<Splat>(n), nullptr, nullptr, n, arena.take<TileSet>(n), arena.take<uint32_t>(n)};
    s.tiles = {arena.take<int64_t>(n_tiles + 1), arena.take<int32_t>(size.n_instances), nullptr, size.n_instances};
    return s;
  }
};

inline void queue_image(cudaStream_t stream, const Gaussians& g, const Late<View<float>>& view,
                        const Late<uint32_t*>& limits, const Camera& size, const RasterSettings& settings,
                        const ImageScratch& s, const Late<Image>& out) {
  check(cudaMemsetAsync(s.zeros, 0, s.n_zeros, stream), "image");
  queue_project(stream, g, view, limits, size, settings, s.projected, s.counts);
  queue_tile(stream, s.projected, Late<ProjectedCounts>::at(s.counts), size, s.tile, s.work, s.tiles);
  queue_blend(stream, s.projected, s.tiles, size, settings, {limits, s.is_undone}, out);
}

}  // namespace cuda
}  // namespace spaceport
