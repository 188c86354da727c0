// The verbs, each for every backend. A backend is a tag: Cpu{pool, simd}, Cuda{stream}.
//
// Buffers are the caller's and C-contiguous, in the backend's memory. What a verb writes, it writes wholly: nothing
// needs to be zeroed before. A verb that needs memory of its own says how many bytes (`..._scratch`); they hold nothing
// that anybody reads later. On a GPU they begin at a multiple of 256.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "parallel.h"
#include "types.h"

namespace spaceport {

enum class Simd { kPortable, kAvx2 };

bool has_avx2();

// The CPU backend: a pool of threads and an instruction set.
struct Cpu {
  std::shared_ptr<ThreadPool> pool;
  Simd simd;
};

// The CUDA backend: a stream (a cudaStream_t) of the device that is current. Work is queued; what returns a number to
// the host waits for it.
struct Cuda {
  void* stream;
};

// Projects the visible Gaussians; returns how many there are, and how many tiles they touch. `out` holds N rows (and N
// + 1 offsets). A row is culled when it lies nearer than `near`, is fainter than the cut-off, touches no tile, has no
// direction (quaternion near zero) or is not finite.
struct ProjectedCounts {
  int64_t n_splats, n_instances;  // M, I
};
size_t project_scratch(const Cpu&, int64_t n_gaussians);
size_t project_scratch(const Cuda&, int64_t n_gaussians);
ProjectedCounts project(const Cpu&, const Gaussians&, const Camera&, const RasterSettings&, void* scratch,
                        const Projected& out);
ProjectedCounts project(const Cuda&, const Gaussians&, const Camera&, const RasterSettings&, void* scratch,
                        const Projected& out);

// What project' writes: every row of the Gaussians, zeros where nothing is visible, and the gradient by the camera's
// pose, with which its centre moves. All twelve numbers of it count as free.
struct ProjectGradient {
  Gaussians gaussians;
  double* cam_from_world;  // [3, 4], or null: not wanted
  void* scratch;           // project_vjp_scratch bytes if it is
};
size_t project_vjp_scratch(const Cpu&, int64_t n_splats);
size_t project_vjp_scratch(const Cuda&, int64_t n_splats);
void project_vjp(const Cpu&, const Gaussians&, const Camera&, const RasterSettings&, const Projected&,
                 const SplatGradient& d_splats, const ProjectGradient& out);
void project_vjp(const Cuda&, const Gaussians&, const Camera&, const RasterSettings&, const Projected&,
                 const SplatGradient& d_splats, const ProjectGradient& out);

// Lists the instances of every tile from front to back; equal depths keep the order of their rows.
size_t tile_scratch(const Cpu&, int64_t n_splats, int64_t n_instances, const Camera&);
size_t tile_scratch(const Cuda&, int64_t n_splats, int64_t n_instances, const Camera&);
void tile(const Cpu&, const Projected&, const Camera&, void* scratch, const Tiles& out);
void tile(const Cuda&, const Projected&, const Camera&, void* scratch, const Tiles& out);

// How many numbers out.hits holds, if the backward pass is to follow.
int64_t hits_size(const Cpu&, int64_t n_instances, const Camera&);
int64_t hits_size(const Cuda&, int64_t n_instances, const Camera&);
void blend(const Cpu&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& out);
void blend(const Cuda&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& out);

// `image` is what blend wrote. d_splats has ten columns if d_image has a depth, else nine, and two more if absolute
// gradients are asked for; there is no gradient by the median depth.
size_t blend_vjp_scratch(const Cpu&, int64_t n_splats, int64_t n_instances, int n_columns, const RasterSettings&);
size_t blend_vjp_scratch(const Cuda&, int64_t n_splats, int64_t n_instances, int n_columns, const RasterSettings&);
void blend_vjp(const Cpu&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& image,
               const Image& d_image, void* scratch, const SplatGradient& d_splats);
void blend_vjp(const Cuda&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& image,
               const Image& d_image, void* scratch, const SplatGradient& d_splats);

// (1 - weight) * L1 + weight * (1 - SSIM) against an 8-bit photo, and its gradient by the colour.
// SSIM as in Wang et al. (2004): 11x11 Gaussian window, sigma 1.5, mean over pixels and channels.
enum class SsimPadding {
  kZero,   // what lies outside the image is zero
  kValid,  // the mean is over those pixels alone whose window lies inside the image, which is not smaller than one
};
struct LossSettings {
  float ssim_weight;
  SsimPadding padding;
};
// What an image is compared with, and how. A mask multiplies both colours before they are compared, and weighs each
// pixel in both means: what it hides has no influence at all. Where it hides everything, the loss is zero.
struct LossTarget {
  const uint8_t* photo;   // [H, W, 3]
  const uint8_t* mask;    // [H, W] in units of 1/255; null: every pixel counts
  const float* exposure;  // [3, 4] matrix | offset, which the image's colours go through first; null: they do not
};
struct LossOutput {
  double* means;      // [2] L1 and SSIM over pixels and channels
  float* d_color;     // [H, W, 3]
  float* d_exposure;  // [3, 4]; null without an exposure
};
struct LossImages {
  const float* color;  // [H, W, 3]
  LossTarget target;
  int width, height;
};
size_t loss_scratch(const Cpu&, int width, int height);
size_t loss_scratch(const Cuda&, int width, int height);
void loss(const Cpu&, const LossImages&, const LossSettings&, void* scratch, const LossOutput& out);
void loss(const Cuda&, const LossImages&, const LossSettings&, void* scratch, const LossOutput& out);

// Adam (Kingma and Ba, 2015) over every row; learning rates per field.
struct AdamSettings {
  float means, log_scales, quaternions, opacities, sh_dc, sh_rest;  // learning rates
  float beta1, beta2, epsilon;
  int64_t step;    // 1 for the first
  float exposure;  // learning rate of the view's exposure
};
// How the moments of SH coefficients lie in memory; those of all else are floats.
enum class MomentStorage {
  kFull,     // as the coefficients do
  kCompact,  // on a GPU: first.sh is [N, K, 3] words, each two bfloat16, of the first moment (the upper half) and of
             // the second. But the constant coefficient keeps floats: its words are the first moment, second.sh is [N,
             // 1, 3]
};
struct AdamMoments {
  Gaussians first, second;
  MomentStorage storage;
};
void update(const Cpu&, const Gaussians& values, const Gaussians& gradient, const AdamMoments&, const AdamSettings&);
void update(const Cuda&, const Gaussians& values, const Gaussians& gradient, const AdamMoments&, const AdamSettings&);

// project_vjp and update in one, without the gradient in between where the backend can do so. The moments' and values'
// rows that are not visible take their step with a gradient of zero.
size_t project_vjp_update_scratch(const Cpu&, const Gaussians&);
size_t project_vjp_update_scratch(const Cuda&, const Gaussians&);
void project_vjp_update(const Cpu&, const Gaussians& values, const Camera&, const RasterSettings&, const Projected&,
                        const float* d_splats, const AdamMoments&, const AdamSettings&, void* scratch);
void project_vjp_update(const Cuda&, const Gaussians& values, const Camera&, const RasterSettings&, const Projected&,
                        const float* d_splats, const AdamMoments&, const AdamSettings&, void* scratch);

// Adds what one step saw of each Gaussian: the norm of its gradient by the mean in normalised device coordinates (that
// of pixels times half the image), and one step of being visible.
struct DensityStatistics {
  float* gradient_sums;  // [N]
  float* n_visible;      // [N]
};
void density(const Cpu&, const Projected&, const float* d_splats, const Camera&, const DensityStatistics&);
void density(const Cuda&, const Projected&, const float* d_splats, const Camera&, const DensityStatistics&);

// Growth (Kerbl et al., 2023): of the rows with a high score small ones are cloned and large ones split in two, sampled
// from their parent; then faint, huge and broken rows are dropped. First the plan, whose counts say how many rows there
// will be, then the rows: those that stay, clones, first and second children, each in the order of what they come from.
// Companions of new rows are zero.
struct DrawKey {
  uint64_t seed;
  uint32_t step;  // the same two draw the same samples
};
struct GrowthSettings {
  float threshold;        // of the score, 0 or more
  float split_log_scale;  // a row that grows is split if its largest is above this, else cloned
  float min_opacity;      // logit
  float max_log_scale;
  int64_t max_rows;  // the highest scores go first where growth alone would lead beyond; 0: no limit
  DrawKey key;
};
struct GrowthCounts {
  int64_t kept, clones, parents;
};
constexpr int kGrowthLists = 3;
struct GrowthPlan {
  int32_t* sources;  // [3, N] rows that stay, that are cloned, that are split: each list at the beginning of its third
  int64_t n_rows;    // N
  GrowthCounts counts;
};
size_t plan_growth_scratch(const Cpu&, int64_t n_gaussians);
size_t plan_growth_scratch(const Cuda&, int64_t n_gaussians);
GrowthCounts plan_growth(const Cpu&, const Gaussians&, const float* scores, const GrowthSettings&, void* scratch,
                         int32_t* sources);
GrowthCounts plan_growth(const Cuda&, const Gaussians&, const float* scores, const GrowthSettings&, void* scratch,
                         int32_t* sources);
void grow(const Cpu&, const Rows&, const GrowthPlan&, const DrawKey&, const Rows& out);
void grow(const Cuda&, const Rows&, const GrowthPlan&, const DrawKey&, const Rows& out);

// The rows that `rows` [out.values.n] names.
void select_rows(const Cpu&, const Rows&, const int32_t* rows, const Rows& out);
void select_rows(const Cuda&, const Rows&, const int32_t* rows, const Rows& out);

struct Points {
  float* values;  // [n, n_dimensions]
  int64_t n, n_dimensions;
};

// Row numbers along a Morton curve through the box of all means: neighbours in space come to lie near each other. Rows
// that are not finite go last.
size_t morton_order_scratch(const Cpu&, int64_t n_gaussians);
size_t morton_order_scratch(const Cuda&, int64_t n_gaussians);
void morton_order(const Cpu&, const Points& means, void* scratch, int32_t* order);
void morton_order(const Cuda&, const Points& means, void* scratch, int32_t* order);

// Rows that are fainter than `min_opacity` (logit) or not finite move onto others, which are drawn by their opacity;
// those that then coincide share opacity and size so that the image stays as it was (Kheradmand et al., 3D Gaussian
// Splatting as Markov chain Monte Carlo, 2024). Companions of rows that changed become zero.
struct Relocation {
  float min_opacity;
  DrawKey key;
};
size_t relocate_scratch(const Cpu&, int64_t n_gaussians);
size_t relocate_scratch(const Cuda&, int64_t n_gaussians);
void relocate(const Cpu&, const Rows&, const Relocation&, void* scratch);
void relocate(const Cuda&, const Rows&, const Relocation&, void* scratch);

// One Lloyd step of k-means: the nearest centroid of every point with its squared distance, the lowest of equally near
// ones; and the weighted means of the points of every centroid. A centroid without weight stays where it is. Labels
// name rows of the centroids; a GPU leaves out points whose label does not.
struct Clusters {
  Points centroids;
  float* weights;  // [n_centroids]
};
constexpr int kMaxPointDimensions = 45;  // on a GPU: SH of degree 3 without the constant
size_t cluster_assign_scratch(const Cpu&, const Points& centroids);
size_t cluster_assign_scratch(const Cuda&, const Points& centroids);
void cluster_assign(const Cpu&, const Points& points, const Points& centroids, void* scratch, int32_t* labels,
                    float* distances);
void cluster_assign(const Cuda&, const Points& points, const Points& centroids, void* scratch, int32_t* labels,
                    float* distances);
size_t cluster_update_scratch(const Cpu&, const Points& points, const Points& centroids);
size_t cluster_update_scratch(const Cuda&, const Points& points, const Points& centroids);
void cluster_update(const Cpu&, const Points& points, const int32_t* labels, const float* weights, void* scratch,
                    const Clusters& out);
void cluster_update(const Cuda&, const Points& points, const int32_t* labels, const float* weights, void* scratch,
                    const Clusters& out);

}  // namespace spaceport
