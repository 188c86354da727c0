// The verbs of a training step as they are queued: nobody waits for the host, counts stay on the device, and what
// changes from step to step may lie there too.
#pragma once

#include "adam.cuh"
#include "launch.cuh"
#include "look_back.cuh"
#include "radix_sort.cuh"
#include "scalar.h"
#include "splat_math.h"
#include "step.h"

namespace spaceport {
namespace cuda {

// What comes with a launch, or lies on the device: then a launch that was recorded finds something new at every replay.
template <class T>
struct Late {
  T value;
  const T* place = nullptr;

  explicit Late(const T& value) : value(value) {}
  static Late at(const T* place) {
    Late late{T{}};
    late.place = place;
    return late;
  }
  __device__ T get() const { return place != nullptr ? *place : value; }
  __device__ const T* place_or_value() const { return place != nullptr ? place : &value; }
  // Called by a whole block, which must synchronise before it reads `shared`.
  __device__ void copy_to(T& shared) const {
    static_assert(sizeof(T) % sizeof(uint32_t) == 0, "copied by words");
    if (place == nullptr) {
      if (threadIdx.x == 0) shared = value;
      return;
    }
    for (unsigned i = threadIdx.x; i < sizeof(T) / sizeof(uint32_t); i += blockDim.x) {
      reinterpret_cast<uint32_t*>(&shared)[i] = reinterpret_cast<const uint32_t*>(place)[i];
    }
  }
};

// A camera of which only the size is known yet.
inline Camera camera_of(const StepSize& size) {
  Camera camera = {};
  camera.width = size.width;
  camera.height = size.height;
  return camera;
}

// The gradient by a splat's first six columns, from the sums that blend' makes of d, the gradient by the exponent of e,
// and of its products with dx, dy, dx^2, dx dy and dy^2: in place.
__device__ inline void gradient_of_moments(const Conic<float>& conic, float opacity, float* row) {
  const float m[6] = {row[0], row[1], row[2], row[3], row[4], row[5]};
  row[0] = conic.a * m[1] + conic.b * m[2];
  row[1] = conic.b * m[1] + conic.c * m[2];
  row[2] = -0.5f * m[3];
  row[3] = -m[4];
  row[4] = -0.5f * m[5];
  row[5] = m[0] / opacity;
}

// Depths as the bits of a float, from the near plane on, to one part in a million and over sixteen octaves: as much as
// three passes of a radix sort take. Splats that agree to that keep the order of their rows.
constexpr uint32_t kDepthMask = (1u << kDepthKeyBits) - 1;
constexpr uint32_t kNoDepth = kDepthMask;   // of a Gaussian that is not visible
constexpr uint32_t kHidden = kNoDepth - 1;  // of one that is, but behind the limits of all its tiles
__device__ inline uint32_t depth_key(float depth, float near) {
  const uint32_t key = (__float_as_uint(depth) - __float_as_uint(near)) >> 3;
  return key < kHidden ? key : kHidden - 1;
}

// Above the depth, a splat's key may say how many instances it has, if they are few: zero leaves that open.
__device__ inline uint32_t with_count(uint32_t depth_key, unsigned n_instances) {
  return n_instances < 1u << (32 - kDepthKeyBits) ? depth_key | n_instances << kDepthKeyBits : depth_key;
}
__device__ inline bool is_listed(uint32_t depth_key) {
  return (depth_key & kDepthMask) < kHidden;
}

// The tiles of a view may have limits [n_tiles]: depth keys behind which no splat reached a pixel at the last visit.
// Then none is listed there at this one.
constexpr uint32_t kNoLimit = 0xffffffffu;
// The tiles that a splat of a depth is listed in.
struct NearSide {
  const uint32_t* limits;  // null: all of them
  uint32_t depth_key;

  __device__ bool holds(int tile) const { return limits == nullptr || depth_key <= limits[tile]; }
};

// Writes each splat at the row of its Gaussian; where none is visible, nothing but kNoDepth or kHidden.
// out.gaussian_from_splat and out.instance_offsets are not used. Adds to `counts`.
void queue_project(cudaStream_t, const Gaussians&, const Late<View<float>>&, const Late<uint32_t*>& depth_limits,
                   const Camera& size, const RasterSettings&, const Projected& out, ProjectedCounts* counts);

// What the blocks of tile's kernels tell each other; zero at the start.
struct TileState {
  LookBack look_back;
  SortState by_depth, by_tile;

  static TileState of(Arena&, int64_t n_splats, int64_t n_instances, const Camera& size);
};

// `projected.n` and `out.n_instances` are capacities: `counts` says how many splats have a depth, and touch how many
// tiles. Instances that do not fit are left out.
size_t queued_tile_scratch(int64_t n_splats, int64_t n_instances, const Camera& size);
void queue_tile(cudaStream_t, const Projected&, const Late<ProjectedCounts>& counts, const Camera& size,
                const TileState&, void* scratch, const Tiles& out);

// Sets the limits for the next visit. Where a tile had one and was seen through to its end, something may be missing:
// it has none from then on, and *is_undone is set.
struct DepthLimits {
  Late<uint32_t*> limits;
  uint32_t* is_undone;
};
void queue_blend(cudaStream_t, const Projected&, const Tiles&, const Camera& size, const RasterSettings&,
                 const DepthLimits&, const Late<Image>& out);

// The sums that give a splat's gradient, with the columns of blend_vjp; they must be zero at the start.
// `d_image.transmittance` may be null. Scratch: that of blend_vjp.
void queue_blend_vjp(cudaStream_t, const Projected&, const Tiles&, const Camera& size, const RasterSettings&,
                     const Image&, const Image& d_image, void* scratch, const SplatGradient& moments);

// A target whose pointers may come late; which of them are null is known from the start.
struct LateTarget {
  Late<LossTarget> late;
  bool has_mask, has_exposure;

  static LateTarget of(const LossTarget& target) {
    return {Late<LossTarget>(target), target.mask != nullptr, target.exposure != nullptr};
  }
};
// `images.target` is not read.
void queue_loss(cudaStream_t, const LossImages& images, const LateTarget&, const LossSettings&, void* scratch,
                const LossOutput& out);

// What project' and Adam in one take from step to step.
struct UpdateInputs {
  View<float> view;
  AdamSettings settings;
  AdamRates rates;
  DensityStatistics statistics;  // null: nobody asks
};
// Gradients by the splats, or the sums that blend' made; those are zero afterwards. Without a gaussian_from_splat,
// splats lie at the rows of their Gaussians.
enum class SplatRows { kGradients, kMoments };
struct SplatGradients {
  SplatRows kind;
  float* rows;  // [M, 9]
};
// The gradients by the rows' colours in the last steps, from which their SH coefficients are brought up to date.
constexpr int kShSlots = 16;
struct ShSlot {
  Vec3<float> center;  // of the camera
  AdamRates rates;
  float rate;  // learning rate
  uint32_t step;
  int n_coefficients;  // that the image was made of
};
struct ShLog {
  float* colors;  // [kShSlots, N, 3]; null: coefficients make every step in time
  ShSlot* slots;  // [kShSlots]
  int* n;         // slots in use
  int64_t n_rows;

  static ShLog of(Arena& arena, int64_t n_gaussians) {
    return {arena.take<float>(kShSlots * n_gaussians * 3), arena.take<ShSlot>(kShSlots), arena.take<int>(1),
            n_gaussians};
  }
};
// Takes a slot for the step, unless it is not made.
void queue_open_slot(cudaStream_t, const ShLog&, const Late<UpdateInputs>&, int n_coefficients,
                     const uint32_t* is_halted);
void queue_constant_update(cudaStream_t, const Gaussians& values, const AdamMoments&, const ShLog&,
                           const Late<UpdateInputs>&, const uint32_t* is_halted);
// Makes the steps of all slots, and frees them, if `least` are in use.
void queue_flush(cudaStream_t, const Gaussians& values, const AdamMoments&, const ShLog&, int least);

// Which rows the update takes, and when.
struct UpdateRule {
  const uint32_t* is_halted;  // on the device: set, nothing changes (but sums become zero); null: never
  int32_t* up_to_date;        // [N] the step that a row has last made, for the rows that contributed; null: all rows
  int* n_contributing;        // zero; unless all rows are taken. Splats must lie at the rows of their Gaussians then
  ShLog log;                  // of SH coefficients that are brought up to date later; only if all rows are taken
};
size_t queued_update_scratch(int64_t n_gaussians);
void queue_project_vjp_update(cudaStream_t, const Gaussians& values, const Late<UpdateInputs>&, const Camera& size,
                              const RasterSettings&, const Projected&, const SplatGradients&, const AdamMoments&,
                              const UpdateRule&, void* scratch);

}  // namespace cuda
}  // namespace spaceport
