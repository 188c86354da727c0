#include "render.h"

#define SPACEPORT_ISA cuda

#include "graph.cuh"
#include "image.cuh"

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

__global__ void note_kernel(const ProjectedCounts* counts, int64_t* most) {
  if (counts->n_instances > *most) *most = counts->n_instances;
}

struct RenderScratch {
  ImageScratch image;
  DeviceFrame* frame;

  static RenderScratch of(Arena& arena, const StepSize& size) {
    return {ImageScratch::of(arena, size, 0), arena.take<DeviceFrame>(1)};
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
                         int64_t* most) {
  const Camera camera = cuda::camera_of(size);
  Arena arena(memory);
  const auto s = cuda::RenderScratch::of(arena, size);
  const cudaGraphExec_t graph = cuda::recorded([&](cudaStream_t stream) {
    cuda::queue_image(stream, gaussians, cuda::Late<cuda::View<float>>::at(&s.frame->view),
                      cuda::Late<uint32_t*>(nullptr), camera, settings, s.image, cuda::Late<Image>::at(&s.frame->out));
    cuda::note_kernel<<<1, 1, 0, stream>>>(s.image.counts, most);
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
