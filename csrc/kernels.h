// The verbs compiled for one instruction set. Included once per set, with SPACEPORT_ISA defined as its namespace.

#include "diagnose.h"
#include "ops.h"

#ifndef SPACEPORT_PIECES
#define SPACEPORT_PIECES
namespace spaceport {
// What one piece of work takes on.
constexpr int64_t kProjectRowsPerPiece = 1024;
constexpr int kLossBlockWidth = 192, kLossBlockHeight = 128;  // pixels: what a block keeps fits the second-level cache
// Of absolute differences, of SSIM and of the gradient by the exposure, over a block.
struct LossSums {
  double l1, ssim, d_exposure[12];
};
}  // namespace spaceport
#endif

namespace spaceport::SPACEPORT_ISA {

ProjectedCounts project(const Cpu&, const Gaussians&, const Camera&, const RasterSettings&, void* scratch,
                        const Projected& out);
void project_vjp(const Cpu&, const Gaussians&, const Camera&, const RasterSettings&, const Projected&,
                 const SplatGradient& d_splats, const ProjectGradient& out);
void blend(const Cpu&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& out);
void blend_vjp(const Cpu&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& image,
               const Image& d_image, void* scratch, const SplatGradient& d_splats);
void loss(const Cpu&, const LossImages&, const LossSettings&, void* scratch, const LossOutput& out);
void update(const Cpu&, const Gaussians& values, const Gaussians& gradient, const Gaussians& first_moment,
            const Gaussians& second_moment, const AdamSettings&);
void cluster_assign(const Cpu&, const Points& points, const Points& centroids, int32_t* labels, float* distances);
void cluster_update(const Cpu&, const Points& points, const int32_t* labels, const float* weights, const Clusters& out);
void multiply_adds(const Cpu&, int64_t n_pieces);

}  // namespace spaceport::SPACEPORT_ISA
