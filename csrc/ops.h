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

// d_splats [M, 9]; writes every row of d_gaussians, zeros where nothing is visible.
void project_vjp(const Cpu&, const Gaussians&, const Camera&, const RasterSettings&, const Projected&,
                 const float* d_splats, const Gaussians& d_gaussians);
void project_vjp(const Cuda&, const Gaussians&, const Camera&, const RasterSettings&, const Projected&,
                 const float* d_splats, const Gaussians& d_gaussians);

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

// `image` is what blend wrote; writes d_splats [M, 9].
size_t blend_vjp_scratch(const Cpu&, int64_t n_instances);
size_t blend_vjp_scratch(const Cuda&, int64_t n_instances);
void blend_vjp(const Cpu&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& image,
               const Image& d_image, void* scratch, float* d_splats);
void blend_vjp(const Cuda&, const Projected&, const Tiles&, const Camera&, const RasterSettings&, const Image& image,
               const Image& d_image, void* scratch, float* d_splats);

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

// One Lloyd step of k-means: the nearest centroid of every point with its squared distance, and the weighted means of
// the points of every centroid. A centroid without weight stays where it is.
struct Points {
  float* values;  // [n, n_dimensions]
  int64_t n, n_dimensions;
};
void cluster_assign(const Cpu&, const Points& points, const Points& centroids, int32_t* labels, float* distances);
void cluster_update(const Cpu&, const Points& points, const int32_t* labels, const float* weights,
                    const Points& centroids, float* centroid_weights);

}  // namespace spaceport
