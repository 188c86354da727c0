// Sends each verb to the instruction set that the caller's Cpu names.
#include <cstdlib>

#define SPACEPORT_ISA portable
#include "kernels.h"
#undef SPACEPORT_ISA
#ifdef SPACEPORT_BUILD_AVX2
#define SPACEPORT_ISA avx2
#include "kernels.h"
#undef SPACEPORT_ISA
#endif

namespace spaceport {

#ifdef SPACEPORT_BUILD_AVX2
#define SPACEPORT_DISPATCH(verb, ...) \
  return cpu.simd == Simd::kAvx2 ? avx2::verb(cpu, __VA_ARGS__) : portable::verb(cpu, __VA_ARGS__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#define SPACEPORT_DISPATCH(verb, ...) return portable::verb(cpu, __VA_ARGS__)
bool has_avx2() {
  return false;
}
#endif

size_t project_scratch(const Cpu&, int64_t n_gaussians) {
  return size_t(n_pieces_of(n_gaussians, kProjectRowsPerPiece)) * sizeof(int64_t);
}

ProjectedCounts project(const Cpu& cpu, const Gaussians& gaussians, const Camera& camera,
                        const RasterSettings& settings, void* scratch, const Projected& out) {
  SPACEPORT_DISPATCH(project, gaussians, camera, settings, scratch, out);
}

size_t project_vjp_scratch(const Cpu&, int64_t n_splats) {
  return size_t(n_pieces_of(n_splats, kProjectRowsPerPiece)) * kPoseSize * sizeof(double);
}

void project_vjp(const Cpu& cpu, const Gaussians& gaussians, const Camera& camera, const RasterSettings& settings,
                 const Projected& projected, const SplatGradient& d_splats, const ProjectGradient& out) {
  SPACEPORT_DISPATCH(project_vjp, gaussians, camera, settings, projected, d_splats, out);
}

void blend(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
           const RasterSettings& settings, const Image& out) {
  SPACEPORT_DISPATCH(blend, projected, tiles, camera, settings, out);
}

int64_t hits_size(const Cpu&, int64_t, const Camera&) {
  return 0;
}

size_t blend_vjp_scratch(const Cpu&, int64_t, int64_t n_instances, int n_columns, const RasterSettings&) {
  return size_t(n_instances) * size_t(n_columns) * sizeof(float);
}

void blend_vjp(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
               const RasterSettings& settings, const Image& image, const Image& d_image, void* scratch,
               const SplatGradient& d_splats) {
  SPACEPORT_DISPATCH(blend_vjp, projected, tiles, camera, settings, image, d_image, scratch, d_splats);
}

size_t loss_scratch(const Cpu&, int width, int height) {
  return size_t(n_pieces_of(width, kLossBlockWidth) * n_pieces_of(height, kLossBlockHeight)) * sizeof(LossSums);
}

void loss(const Cpu& cpu, const LossImages& images, const LossSettings& settings, void* scratch,
          const LossOutput& out) {
  SPACEPORT_DISPATCH(loss, images, settings, scratch, out);
}

void update(const Cpu& cpu, const Gaussians& values, const Gaussians& gradient, const AdamMoments& moments,
            const AdamSettings& settings) {
  SPACEPORT_DISPATCH(update, values, gradient, moments.first, moments.second, settings);
}

size_t project_vjp_update_scratch(const Cpu&, const Gaussians& values) {
  return size_t(values.n) * size_t(11 + 3 * values.n_coefficients) * sizeof(float);
}

void project_vjp_update(const Cpu& cpu, const Gaussians& values, const Camera& camera, const RasterSettings& settings,
                        const Projected& projected, const float* d_splats, const AdamMoments& moments,
                        const AdamSettings& adam, void* scratch) {
  float* part = static_cast<float*>(scratch);
  const auto take = [&](int64_t n_columns) {
    float* taken = part;
    part += values.n * n_columns;
    return taken;
  };
  Gaussians gradient = values;
  gradient.means = take(3);
  gradient.log_scales = take(3);
  gradient.quaternions = take(4);
  gradient.opacities = take(1);
  gradient.sh = take(3 * values.n_coefficients);
  const SplatGradient d = {const_cast<float*>(d_splats), kSplatGradientStride};
  project_vjp(cpu, values, camera, settings, projected, d, {gradient, nullptr, nullptr});
  update(cpu, values, gradient, moments, adam);
}

size_t cluster_assign_scratch(const Cpu&, const Points&) {
  return 0;
}

void cluster_assign(const Cpu& cpu, const Points& points, const Points& centroids, void*, int32_t* labels,
                    float* distances) {
  SPACEPORT_DISPATCH(cluster_assign, points, centroids, labels, distances);
}

size_t cluster_update_scratch(const Cpu&, const Points&, const Points&) {
  return 0;
}

void cluster_update(const Cpu& cpu, const Points& points, const int32_t* labels, const float* weights, void*,
                    const Clusters& out) {
  SPACEPORT_DISPATCH(cluster_update, points, labels, weights, out);
}

void multiply_adds(const Cpu& cpu, int64_t n_pieces) {
  SPACEPORT_DISPATCH(multiply_adds, n_pieces);
}

}  // namespace spaceport
