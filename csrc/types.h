// The nouns of the engine: plain structs of pointers and sizes. Python owns every buffer.
// The same names, shapes and units as in spaceport_gs/types.py and spaceport_gs/gaussians.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.h"

namespace spaceport {

// The only copy of the constants of the method.
constexpr int kTileSize = 16;                  // pixels along each side of a tile
constexpr float kAlphaCutoff = 1.0f / 255.0f;  // fainter contributions are skipped
constexpr float kLog2E = 1.44269504f;
constexpr float kLog2Cutoff = -7.99435344f;         // log2(kAlphaCutoff)
constexpr float kTransmittanceStop = 1e-4f;         // a pixel stops before it falls below this
constexpr float kJacobianMargin = 0.3f;             // x/z in the Jacobian may leave the image by this times tan fov
constexpr float kMinQuaternionNormSquared = 1e-8f;  // a shorter quaternion has no direction
constexpr int kMaxShCoefficients = 16;              // degree 3
constexpr int kSsimWindow = 11;                     // pixels along each side of the window
constexpr int kSplatStride = 12;                    // floats of a row of Projected::splats
constexpr int kSplatGradientStride = 9;             // of these, the first nine carry gradients
constexpr int64_t kMostInstances = (int64_t(1) << 30) - 1;  // of one list
constexpr int kSplatDepthGradientStride = 10;               // and the tenth, where the loss sees the depth
constexpr int kAbsoluteColumns = 2;                         // behind those, where they are asked for
constexpr int kDepthKeyBits = 24;                           // of what a GPU sorts the splats by
constexpr int kPoseSize = 12;                               // numbers of a camera's pose
constexpr float kMedianTransmittance = 0.5f;  // the median depth is that of the splat that takes it below this

struct Camera {
  float cam_from_world[kPoseSize];   // 3 rows of rotation | translation
  float center[3];                   // in the world
  float fx, fy, cx, cy;              // pixels
  int width, height;                 // pixels; pixel (i, j) has its centre at (i + 0.5, j + 0.5)
  float above = 0.0f, below = 0.0f;  // rows of the whole image, where this is a band of it

  int tiles_x() const { return (width + kTileSize - 1) / kTileSize; }
  int tiles_y() const { return (height + kTileSize - 1) / kTileSize; }
};

struct RasterSettings {
  int sh_degree;
  float near;
  float low_pass;  // px^2
  float alpha_max;
  float background[3];
  bool deterministic = false;  // sums of gradients are made in a fixed order; on the CPU they always are
};

// Gradient by the splats' first columns: nine, or ten where the loss sees the depth. Behind them there may be two more,
// of blend' alone: sums over the pixels of |gradient by x| and |gradient by y| (Ye et al., AbsGS, 2024).
struct SplatGradient {
  float* rows;  // [M, n_columns]
  int n_columns;
};
HOST_DEVICE constexpr bool has_absolute(int n_columns) {
  return n_columns > kSplatDepthGradientStride;
}
HOST_DEVICE constexpr bool has_depth(int n_columns) {
  return n_columns - has_absolute(n_columns) * kAbsoluteColumns == kSplatDepthGradientStride;
}
// Calls run with the number as a constant.
template <class Run>
void for_columns(int n_columns, Run&& run) {
  constexpr int kPlain = kSplatGradientStride, kDeep = kSplatDepthGradientStride;
  switch (n_columns) {
    case kPlain:
      return run(std::integral_constant<int, kPlain>());
    case kDeep:
      return run(std::integral_constant<int, kDeep>());
    case kPlain + kAbsoluteColumns:
      return run(std::integral_constant<int, kPlain + kAbsoluteColumns>());
    case kDeep + kAbsoluteColumns:
      return run(std::integral_constant<int, kDeep + kAbsoluteColumns>());
  }
}

// Raw parameters; a gradient and each of Adam's moments have the same type.
struct Gaussians {
  float* means;        // [N, 3]
  float* log_scales;   // [N, 3]
  float* quaternions;  // [N, 4] w, x, y, z, not normalised
  float* opacities;    // [N] logit
  float* sh;           // [N, K, 3]
  int64_t n;
  int n_coefficients;  // K = 1, 4, 9 or 16
};

// Values, and what has a row for each of theirs: Adam's moments. They are added, moved and removed together.
constexpr int kMaxCompanions = 2;
struct Rows {
  Gaussians values;
  Gaussians companions[kMaxCompanions];
  int n_companions;
};

// One row of Projected::splats. Conic (a, b, c): alpha = opacity * exp(-(a dx^2 + c dy^2) / 2 - b dx dy).
struct Splat {
  float x, y;     // pixels
  float a, b, c;  // 1 / px^2
  float opacity;
  float red, green, blue;
  float depth;               // z in the camera
  float extent_x, extent_y;  // half sizes of the box outside which alpha < kAlphaCutoff
};
static_assert(sizeof(Splat) == kSplatStride * sizeof(float));

constexpr int kTileBoxSide = 8;
// The tiles that a splat touches. Those of a box of 8x8 tiles are bits, row by row; a splat that reaches further has
// none set, and is asked again.
struct TileSet {
  uint32_t corner;  // of the box: its first row << 16 | its first column
  uint32_t n;
  uint64_t bits;
};

// The visible Gaussians, in the order of their rows. Buffers hold N rows, of which the first n are used.
struct Projected {
  Splat* splats;                 // [M]
  int32_t* gaussian_from_splat;  // [M], ascending
  int64_t* instance_offsets;     // [M + 1], splat m owns the instances offsets[m] ... offsets[m + 1] - 1
  int64_t n;                     // M
  // What a GPU lists the tiles by; null on the CPU.
  TileSet* touched;      // [M]
  uint32_t* depth_keys;  // [M] what the splats are sorted by, in the lower 24 bits
};

// An instance is one (splat, tile) pair; it is numbered in the order of emission: by splat, then by tile.
struct Tiles {
  int64_t* offsets;               // [n_tiles + 1]
  int32_t* splat_from_instance;   // [I], tile by tile, each from front to back
  int32_t* number_from_instance;  // [I]; null on a GPU
  int64_t n_instances;
};

// A rendered image, or the gradient of a loss by one.
struct Image {
  float* color;                   // [H, W, 3], background blended in
  float* transmittance;           // [H, W]
  int32_t* hits;                  // what blend on a GPU keeps for its backward pass (see hits_size), or null
  float* depth = nullptr;         // [H, W] sum of the splats' z by their weights, or null
  float* median_depth = nullptr;  // [H, W] or null; zero where no splat takes transmittance below one half
};

}  // namespace spaceport
