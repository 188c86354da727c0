#include "step.h"

#define SPACEPORT_ISA cuda

#include <algorithm>

#include "graph.cuh"
#include "queued.cuh"
#include "ssim_math.h"

namespace spaceport {
namespace cuda {

namespace {

// What the recorded kernels find on the device: written anew before every replay.
struct DeviceInputs {
  UpdateInputs update;
  LossTarget target;
  StepExposure exposure;
  uint32_t* depth_limits;
};

__global__ void set_inputs_kernel(DeviceInputs inputs, DeviceInputs* place) {
  *place = inputs;
}

// Books the step once its loss and its number of instances are known, before it changes anything.
__global__ void book_kernel(const double* means, const ProjectedCounts* counts, int64_t capacity, double ssim_weight,
                            StepBook book) {
  StepProgress& progress = *book.device;
  if (progress.is_halted == 0) {
    progress.n_instances = counts->n_instances;
    if (counts->n_instances > capacity) {
      progress.is_halted = 1;
    } else {
      progress.loss = (1.0 - ssim_weight) * means[0] + ssim_weight * (1.0 - means[1]);
      progress.loss_sum += progress.loss;
      ++progress.n_done;
    }
  }
  *book.host = progress;
}

// Adam on the exposure of the view, unless the step is not made: a thread for each number.
__global__ void update_exposure_kernel(const float* gradient, const DeviceInputs* inputs, const uint32_t* is_halted) {
  if (*is_halted != 0) return;
  const StepExposure& exposure = inputs->exposure;
  const float step = *exposure.n_steps + 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) *exposure.n_steps = step;
  AdamRates rates = inputs->update.rates;
  rates.first_correction = -1.0f / expm1f(step * logf(rates.beta1));
  rates.second_correction = -1.0f / expm1f(step * logf(rates.beta2));
  const int i = int(threadIdx.x);
  adam(exposure.values[i], gradient[i], exposure.first[i], exposure.second[i], inputs->update.settings.exposure, rates);
}

struct StepScratch {
  char* zeros;  // what must be zero at the start of a step
  size_t n_zeros;
  TileState tile;
  uint32_t* is_undone;
  int* n_contributing;
  void* work;  // what tile, loss, blend' and update each use for themselves, one after the other
  DeviceInputs* inputs;
  Projected projected;
  ProjectedCounts* counts;
  Tiles tiles;
  Image image, d_image;
  double* means;
  float* d_exposure;

  static StepScratch of(Arena& arena, const StepSize& size, const RasterSettings& raster) {
    const Camera camera = camera_of(size);
    const int64_t n = size.n_gaussians, n_pixels = int64_t(size.width) * size.height;
    const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
    const Cuda any = {nullptr};
    StepScratch s = {};
    s.zeros = arena.take<char>(0);
    s.tile = TileState::of(arena, n, size.n_instances, camera);
    s.is_undone = arena.take<uint32_t>(1);
    s.n_contributing = arena.take<int>(1);
    s.counts = arena.take<ProjectedCounts>(1);
    s.n_zeros = arena.used();
    s.work = arena.take<char>(
        int64_t(std::max({queued_tile_scratch(n, size.n_instances, camera), queued_update_scratch(n),
                          loss_scratch(any, size.width, size.height),
                          blend_vjp_scratch(any, n, size.n_instances, kSplatGradientStride, raster)})));
    s.inputs = arena.take<DeviceInputs>(1);
    s.projected = {arena.take<Splat>(n), nullptr, nullptr, n, arena.take<TileSet>(n), arena.take<uint32_t>(n)};
    s.tiles = {arena.take<int64_t>(n_tiles + 1), arena.take<int32_t>(size.n_instances), nullptr, size.n_instances};
    s.image = {arena.take<float>(3 * n_pixels), arena.take<float>(n_pixels),
               arena.take<int32_t>(hits_size(any, size.n_instances, camera))};
    s.d_image = {arena.take<float>(3 * n_pixels), nullptr, nullptr};
    s.means = arena.take<double>(2);
    s.d_exposure = arena.take<float>(kExposureSize);
    return s;
  }
};

ShLog log_of(const StepBuffers& buffers) {
  if (buffers.sh_log == nullptr) return {};
  Arena arena(buffers.sh_log);
  return ShLog::of(arena, buffers.values.n);
}

// What a step is recorded for.
struct StepRecipe {
  Camera camera;  // its size
  StepParts parts;
  RasterSettings raster;
  LossSettings loss;
};

void queue_step(cudaStream_t stream, const StepBuffers& buffers, const StepScratch& s, const StepRecipe& recipe,
                const StepBook& book) {
  const Camera& camera = recipe.camera;
  const RasterSettings& raster = recipe.raster;
  // Without conditions nothing would make up for limits that prove wrong.
  const bool uses_limits = recipe.parts.has_limits && has_conditions();
  const auto queue_image = [&](cudaStream_t stream) {
    const auto limits = uses_limits ? Late<uint32_t*>::at(&s.inputs->depth_limits) : Late<uint32_t*>(nullptr);
    check(cudaMemsetAsync(s.zeros, 0, s.n_zeros, stream), "step");
    queue_project(stream, buffers.values, Late<View<float>>::at(&s.inputs->update.view), limits, camera, raster,
                  s.projected, s.counts);
    queue_tile(stream, s.projected, Late<ProjectedCounts>::at(s.counts), camera, s.tile, s.work, s.tiles);
    queue_blend(stream, s.projected, s.tiles, camera, raster, {limits, s.is_undone}, Late<Image>(s.image));
  };
  queue_image(stream);
  if (uses_limits) record_if(stream, s.is_undone, &book.device->n_rendered_again, queue_image);
  const LossImages images = {s.image.color, {}, camera.width, camera.height};
  const LateTarget target = {Late<LossTarget>::at(&s.inputs->target), recipe.parts.has_mask, recipe.parts.has_exposure};
  queue_loss(stream, images, target, recipe.loss, s.work, {s.means, s.d_image.color, s.d_exposure});
  book_kernel<<<1, 1, 0, stream>>>(s.means, s.counts, s.tiles.n_instances, double(recipe.loss.ssim_weight), book);
  if (recipe.parts.has_exposure) {
    update_exposure_kernel<<<1, kExposureSize, 0, stream>>>(s.d_exposure, s.inputs, &book.device->is_halted);
  }
  queue_blend_vjp(stream, s.projected, s.tiles, camera, raster, s.image, s.d_image, s.work,
                  {buffers.sums, kSplatGradientStride});
  queue_project_vjp_update(stream, buffers.values, Late<UpdateInputs>::at(&s.inputs->update), camera, raster,
                           s.projected, {SplatRows::kMoments, buffers.sums}, buffers.moments,
                           {&book.device->is_halted, buffers.up_to_date, s.n_contributing, log_of(buffers)}, s.work);
  check_launch("step");
}

}  // namespace
}  // namespace cuda

size_t step_scratch(const Cuda&, const StepSize& size, const RasterSettings& raster) {
  Arena arena(nullptr);
  cuda::StepScratch::of(arena, size, raster);
  return arena.used();
}

struct StepGraph::Recorded {
  cudaGraphExec_t graph;
  cuda::DeviceInputs* inputs;
  DensityStatistics statistics;
  int width, height;
  StepParts parts;
};

StepGraph::StepGraph(const StepBuffers& buffers, const StepSize& size, const StepParts& parts,
                     const RasterSettings& raster, const LossSettings& loss, const StepBook& book) {
  const Camera camera = cuda::camera_of(size);
  Arena arena(buffers.scratch);
  const cuda::StepScratch scratch = cuda::StepScratch::of(arena, size, raster);
  const cudaGraphExec_t graph = cuda::recorded(
      [&](cudaStream_t stream) { cuda::queue_step(stream, buffers, scratch, {camera, parts, raster, loss}, book); });
  recorded_ = new Recorded{graph, scratch.inputs, buffers.statistics, size.width, size.height, parts};
}

StepGraph::~StepGraph() {
  cudaGraphExecDestroy(recorded_->graph);
  delete recorded_;
}

void StepGraph::launch(const Cuda& backend, const StepInputs& inputs) const {
  if (inputs.view.camera.width != recorded_->width || inputs.view.camera.height != recorded_->height) {
    throw std::invalid_argument("camera: the step was recorded for images of another size");
  }
  const StepParts& parts = recorded_->parts;
  const LossTarget& target = inputs.view.target;
  if ((target.mask != nullptr) != parts.has_mask || (target.exposure != nullptr) != parts.has_exposure ||
      (inputs.view.depth_limits != nullptr) != parts.has_limits) {
    throw std::invalid_argument("view: the step was recorded for views with another mask, exposure or limits");
  }
  const cudaStream_t stream = stream_of(backend);
  const cuda::DeviceInputs on_device = {
      {cuda::view_of<float>(inputs.view.camera), inputs.adam, cuda::AdamRates::of(inputs.adam),
       inputs.gathers_statistics ? recorded_->statistics : DensityStatistics{}},
      target,
      inputs.view.exposure,
      inputs.view.depth_limits};
  cuda::set_inputs_kernel<<<1, 1, 0, stream>>>(on_device, recorded_->inputs);
  check_launch("step");
  check(cudaGraphLaunch(recorded_->graph, stream), "step");
}

}  // namespace spaceport
