// A whole training step on a GPU as one recorded sequence (a CUDA graph): project, tile, blend, loss, blend', and
// project' fused with Adam. The host reads nothing in it. Whether the tiles' lists fitted their memory is known on the
// device alone: a step that does not fit changes nothing, nor do those behind it, until the host has seen it and starts
// again with more memory.
#pragma once

#include "ops.h"

namespace spaceport {

// What a step works on; buffers are the caller's and stay where they are while the step is in use.
struct StepBuffers {
  Gaussians values;
  AdamMoments moments;
  float* sums;                   // [N, 9], zero before the first step
  int32_t* up_to_date;           // [N] the step that each row has last made; null: every row makes every step
  void* sh_log;                  // sh_log_size bytes, zero before the first step; null: no log. See flush_sh
  DensityStatistics statistics;  // where a step adds what it saw, if it is told to
  void* scratch;                 // step_scratch bytes
};
struct StepSize {
  int64_t n_gaussians;
  int64_t n_instances;  // capacity
  int width, height;
};
size_t step_scratch(const Cuda&, const StepSize&, const RasterSettings&);

// Rows that did not contribute to the image miss the steps of Adam until they do again; this makes up for them in all
// rows, up to and with settings.step.
void catch_up(const Cuda&, const Gaussians& values, const AdamMoments&, int32_t* up_to_date, const AdamSettings&);

// A step may log what moves the SH coefficients beyond the constant one, and bring them up to date after sixteen steps
// at once, if every row makes every step. This does so at once with what is logged.
size_t sh_log_size(const Cuda&, int64_t n_gaussians);
void flush_sh(const Cuda&, const Gaussians& values, const AdamMoments&, void* sh_log);

// How far the steps have come: kept on the device, and copied to the host behind every step.
struct StepProgress {
  int64_t n_done;             // steps that changed the Gaussians
  int64_t n_instances;        // of the last step, or of the first that did not fit
  double loss_sum;            // of the steps done
  double loss;                // of the last
  uint32_t is_halted;         // a step did not fit
  uint32_t n_rendered_again;  // because depth limits had left out what could be seen
};
struct StepBook {
  StepProgress* device;
  StepProgress* host;  // pinned
};

// A view's exposure, its moments and the number of its steps, each its own: Adam moves it in every step on the view.
struct StepExposure {
  float *values, *first, *second;  // [3, 4]
  float* n_steps;                  // [1]
};
// What changes from step to step.
struct StepView {
  Camera camera;
  LossTarget target;
  StepExposure exposure;  // that of the target; null without one
  // [n_tiles] what the view's last visit knows for the next, all bits set before the first; or null.
  uint32_t* depth_limits;
};
// Whether the views of a recorded step have a mask, an exposure, and limits of depth.
struct StepParts {
  bool has_mask, has_exposure, has_limits;
};
struct StepInputs {
  StepView view;
  AdamSettings adam;
  bool gathers_statistics;
};

class StepGraph {
 public:
  // Records the sequence for images of one size.
  StepGraph(const StepBuffers&, const StepSize&, const StepParts&, const RasterSettings&, const LossSettings&,
            const StepBook&);
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  // The view has the size and the parts that were recorded.
  void launch(const Cuda&, const StepInputs&) const;

 private:
  struct Recorded;
  Recorded* recorded_;
};

}  // namespace spaceport
