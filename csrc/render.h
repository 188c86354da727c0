// Images of Gaussians on a GPU as one recorded sequence (a CUDA graph): project, tile, blend. The host reads nothing in
// it, so that images of many cameras follow each other without a gap.
#pragma once

#include "ops.h"
#include "step.h"

namespace spaceport {

size_t render_scratch(const Cuda&, const StepSize&);

class RenderGraph {
 public:
  // Records the sequence for images of one size; the Gaussians stay where they are. `most`, on the GPU, becomes the
  // most instances that an image had: where they are more than the capacity, some images lack what is far away.
  RenderGraph(const Gaussians&, const StepSize&, const RasterSettings&, void* scratch, int64_t* most);
  ~RenderGraph();
  RenderGraph(const RenderGraph&) = delete;
  RenderGraph& operator=(const RenderGraph&) = delete;

  // The camera has the size that was recorded; `out` as blend writes it, without hits.
  void launch(const Cuda&, const Camera&, const Image& out) const;

 private:
  struct Recorded;
  Recorded* recorded_;
};

}  // namespace spaceport
