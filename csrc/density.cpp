// density: what densification needs to know of every Gaussian, gathered step by step.
#include <cmath>

#include "ops.h"

namespace spaceport {

void density(const Cpu& cpu, const Projected& projected, const float* d_splats, const Camera& camera,
             const DensityStatistics& out) {
  constexpr int64_t kSplatsPerPiece = 1 << 14;
  const float half_width = 0.5f * float(camera.width), half_height = 0.5f * float(camera.height);
  parallel_for(*cpu.pool, n_pieces_of(projected.n, kSplatsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kSplatsPerPiece);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t row = projected.gaussian_from_splat[i];
      const float* d = d_splats + i * kSplatGradientStride;
      out.gradient_sums[row] += std::hypot(d[0] * half_width, d[1] * half_height);
      out.n_visible[row] += 1.0f;
    }
  });
}

}  // namespace spaceport
