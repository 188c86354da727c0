#include "step.h"

#define SPACEPORT_ISA cuda

#include <algorithm>

#include "graph.cuh"
#include "image.cuh"
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
  ImageScratch image;  // `work` serves loss, blend' and update too, one after the other
  DeviceInputs* inputs;
  Image pixels, d_pixels;
  double* means;
  float* d_exposure;

  static StepScratch of(Arena& arena, const StepSize& size, const RasterSettings& raster) {
    const Cuda any = {nullptr};
    const int64_t n = size.n_gaussians, n_pixels = int64_t(size.width) * size.height;
    StepScratch s = {};
    s.image = ImageScratch::of(arena, size,
                               std::max({queued_update_scratch(n), loss_scratch(any, size.width, size.height),
                                         blend_vjp_scratch(any, n, size.n_instances, kSplatGradientStride, raster)}));
    s.inputs = arena.take<DeviceInputs>(1);
    s.pixels = {arena.take<float>(3 * n_pixels), arena.take<float>(n_pixels),
                arena.take<int32_t>(hits_size(any, size.n_instances, camera_of(size)))};
    s.d_pixels = {arena.take<float>(3 * n_pixels), nullptr, nullptr};
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
  const auto view = Late<View<float>>::at(&s.inputs->update.view);
  const auto limits = uses_limits ? Late<uint32_t*>::at(&s.inputs->depth_limits) : Late<uint32_t*>(nullptr);
  const ImageScratch& image = s.image;
  const auto queue_pixels = [&](cudaStream_t stream) {
    queue_image(stream, buffers.values, view, limits, camera, raster, image, Late<Image>(s.pixels));
  };
  queue_pixels(stream);
  if (uses_limits) record_if(stream, image.is_undone, &book.device->n_rendered_again, queue_pixels);
  const LossImages images = {s.pixels.color, {}, camera.width, camera.height};
  const LateTarget target = {Late<LossTarget>::at(&s.inputs->target), recipe.parts.has_mask, recipe.parts.has_exposure};
  queue_loss(stream, images, target, recipe.loss, image.work, {s.means, s.d_pixels.color, s.d_exposure});
  book_kernel<<<1, 1, 0, stream>>>(s.means, image.counts, image.tiles.n_instances, double(recipe.loss.ssim_weight),
                                   book);
  if (recipe.parts.has_exposure) {
    update_exposure_kernel<<<1, kExposureSize, 0, stream>>>(s.d_exposure, s.inputs, &book.device->is_halted);
  }
  queue_blend_vjp(stream, image.projected, image.tiles, camera, raster, s.pixels, s.d_pixels, image.work,
                  {buffers.sums, kSplatGradientStride});
  queue_project_vjp_update(stream, buffers.values, Late<UpdateInputs>::at(&s.inputs->update), camera, raster,
                           image.projected, {SplatRows::kMoments, buffers.sums}, buffers.moments,
                           {&book.device->is_halted, buffers.up_to_date, image.n_contributing, log_of(buffers)},
                           image.work);
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
