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

int64_t project(const Cpu& cpu, const Gaussians& gaussians, const Camera& camera, const RasterSettings& settings,
                const Projected& out) {
  SPACEPORT_DISPATCH(project, gaussians, camera, settings, out);
}

void project_vjp(const Cpu& cpu, const Gaussians& gaussians, const Camera& camera, const RasterSettings& settings,
                 const Projected& projected, const float* d_splats, const Gaussians& d_gaussians) {
  SPACEPORT_DISPATCH(project_vjp, gaussians, camera, settings, projected, d_splats, d_gaussians);
}

void blend(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
           const RasterSettings& settings, const Image& out) {
  SPACEPORT_DISPATCH(blend, projected, tiles, camera, settings, out);
}

void blend_vjp(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
               const RasterSettings& settings, const Image& image, const Image& d_image, const BlendGradient& out) {
  SPACEPORT_DISPATCH(blend_vjp, projected, tiles, camera, settings, image, d_image, out);
}

LossValue loss(const Cpu& cpu, const float* color, const uint8_t* photo, int width, int height,
               const LossSettings& settings, float* d_color) {
  SPACEPORT_DISPATCH(loss, color, photo, width, height, settings, d_color);
}

void update(const Cpu& cpu, const Gaussians& values, const Gaussians& gradient, const Gaussians& first_moment,
            const Gaussians& second_moment, const AdamSettings& settings) {
  SPACEPORT_DISPATCH(update, values, gradient, first_moment, second_moment, settings);
}

void cluster_assign(const Cpu& cpu, const Points& points, const Points& centroids, int32_t* labels, float* distances) {
  SPACEPORT_DISPATCH(cluster_assign, points, centroids, labels, distances);
}

void cluster_update(const Cpu& cpu, const Points& points, const int32_t* labels, const float* weights,
                    const Points& centroids, float* centroid_weights) {
  SPACEPORT_DISPATCH(cluster_update, points, labels, weights, centroids, centroid_weights);
}

void multiply_adds(const Cpu& cpu, int64_t n_pieces) {
  SPACEPORT_DISPATCH(multiply_adds, n_pieces);
}

}  // namespace spaceport
