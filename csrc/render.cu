#include "render.h"

#define SPACEPORT_ISA cuda

#include "graph.cuh"
#include "queued.cuh"

namespace spaceport {
namespace cuda {

namespace {

// What the recorded kernels find on the device: written anew before every replay.
struct DeviceFrame {
  View<float> view;
  Image out;
};

__global__ void set_frame_kernel(DeviceFrame frame, DeviceFrame* place) {
  *place = frame;
}

__global__ void note_kernel(const ProjectedCounts* counts, RenderBook book) {
  if (counts->n_instances > *book.device) *book.device = counts->n_instances;
  *book.host = *book.device;
}

struct RenderScratch {
  char* zeros;  // what must be zero at the start of an image
  size_t n_zeros;
  TileState tile;
  ProjectedCounts* counts;
  void* work;
  DeviceFrame* frame;
  Projected projected;
  Tiles tiles;

  static RenderScratch of(Arena& arena, const StepSize& size) {
    const Camera camera = camera_of(size);
    const int64_t n = size.n_gaussians, n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
    RenderScratch s = {};
    s.zeros = arena.take<char>(0);
    s.tile = TileState::of(arena, n, size.n_instances, camera);
    s.counts = arena.take<ProjectedCounts>(1);
    s.n_zeros = arena.used();
    s.work = arena.take<char>(int64_t(queued_tile_scratch(n, size.n_instances, camera)));
    s.frame = arena.take<DeviceFrame>(1);
    s.projected = {arena.take<Splat>(n), nullptr, nullptr, n, arena.take<TileSet>(n), arena.take<uint32_t>(n)};
    s.tiles = {arena.take<int64_t>(n_tiles + 1), arena.take<int32_t>(size.n_instances), nullptr, size.n_instances};
    return s;
  }
};

}  // namespace
}  // namespace cuda

size_t render_scratch(const Cuda&, const StepSize& size) {
  Arena arena(nullptr);
  cuda::RenderScratch::of(arena, size);
  return arena.used();
}

struct RenderGraph::Recorded {
  cudaGraphExec_t graph;
  cuda::DeviceFrame* frame;
  int width, height;
};

RenderGraph::RenderGraph(const Gaussians& gaussians, const StepSize& size, const RasterSettings& settings, void* memory,
                         const RenderBook& book) {
  const Camera camera = cuda::camera_of(size);
  Arena arena(memory);
  const auto s = cuda::RenderScratch::of(arena, size);
  const cudaGraphExec_t graph = cuda::recorded([&](cudaStream_t stream) {
    const cuda::Late<uint32_t*> no_limits(nullptr);
    check(cudaMemsetAsync(s.zeros, 0, s.n_zeros, stream), "render");
    cuda::queue_project(stream, gaussians, cuda::Late<cuda::View<float>>::at(&s.frame->view), no_limits, camera,
                        settings, s.projected, s.counts);
    cuda::queue_tile(stream, s.projected, cuda::Late<ProjectedCounts>::at(s.counts), camera, s.tile, s.work, s.tiles);
    cuda::queue_blend(stream, s.projected, s.tiles, camera, settings, {no_limits, nullptr},
                      cuda::Late<Image>::at(&s.frame->out));
    cuda::note_kernel<<<1, 1, 0, stream>>>(s.counts, book);
    check_launch("render");
  });
  recorded_ = new Recorded{graph, s.frame, size.width, size.height};
}

RenderGraph::~RenderGraph() {
  cudaGraphExecDestroy(recorded_->graph);
  delete recorded_;
}

void RenderGraph::launch(const Cuda& backend, const Camera& camera, const Image& out) const {
  if (camera.width != recorded_->width || camera.height != recorded_->height) {
    throw std::invalid_argument("camera: the renderer was recorded for images of another size");
  }
  const cudaStream_t stream = stream_of(backend);
  cuda::set_frame_kernel<<<1, 1, 0, stream>>>({cuda::view_of<float>(camera), out}, recorded_->frame);
  check_launch("render");
  check(cudaGraphLaunch(recorded_->graph, stream), "render");
}

}  // namespace spaceport
