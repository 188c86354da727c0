// What growth, relocation and reordering draw and decide for one Gaussian, the same on both backends.
#pragma once

#include <cmath>

#include "ops.h"
#include "scalar.h"
#include "splat_math.h"

namespace spaceport::SPACEPORT_ISA {

// Numbers that look random, of a counter and a key alone (Philox 4x32-10; Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3, 2011).
struct Words {
  uint32_t word[4];
};
HOST_DEVICE Words philox(Words counter, uint64_t key) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter.word[0], b = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(b >> 32) ^ counter.word[1] ^ low, uint32_t(b), uint32_t(a >> 32) ^ counter.word[3] ^ high,
                uint32_t(a)}};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return counter;
}

enum DrawStream : uint32_t { kDrawChild, kDrawSource };

// Of a row and, where it draws several times, a number.
HOST_DEVICE Words draw(const DrawKey& key, DrawStream stream, int64_t row, uint32_t number) {
  return philox({{uint32_t(row), number, key.step, stream}}, key.seed);
}

constexpr float kTurn = 6.28318531f;
HOST_DEVICE float uniform_of(uint32_t word) {
  return (float(word) + 0.5f) * 0x1p-32f;
}
HOST_DEVICE float radius_of(uint32_t word) {
  return sqrtf(-2.0f * logf(uniform_of(word)));
}
// Three independent samples of the standard normal distribution (Box and Muller, 1958).
HOST_DEVICE Vec3<float> normal_of(const Words& words) {
  const float first = radius_of(words.word[0]), second = radius_of(words.word[2]);
  const float angle = kTurn * uniform_of(words.word[1]);
  return {first * cosf(angle), first * sinf(angle), second * cosf(kTurn * uniform_of(words.word[3]))};
}

// A sample of the Gaussian of a row, from its mean.
HOST_DEVICE Vec3<float> child_offset(const Gaussians& g, int64_t row, uint32_t child, const DrawKey& key) {
  const float *s = g.log_scales + 3 * row, *q = g.quaternions + 4 * row;
  const Vec3<float> normal = normal_of(draw(key, kDrawChild, row, child));
  const Vec3<float> local = {exponential(s[0]) * normal.x, exponential(s[1]) * normal.y, exponential(s[2]) * normal.z};
  const Quaternion<float> quaternion = {q[0], q[1], q[2], q[3]};
  if (!(norm_squared(quaternion) >= kMinQuaternionNormSquared)) return local;
  return rotation(normalized(quaternion)) * local;
}

constexpr float kLogChildSize = -0.470003629f;  // of two children, 1 / (0.8 * 2) as large as their parent

HOST_DEVICE float largest_log_scale(const Gaussians& g, int64_t row) {
  const float* s = g.log_scales + 3 * row;
  return larger(larger(s[0], s[1]), s[2]);
}

// Lists that a row is in, as bits: in none if it is dropped.
enum Fate : uint32_t { kDropped = 0, kKept = 1, kCloned = 2, kSplit = 4 };

// Of a row without NaN or infinity.
HOST_DEVICE uint32_t fate_of(const Gaussians& g, int64_t row, bool grows, const GrowthSettings& s) {
  const float size = largest_log_scale(g, row);
  const bool is_split = grows && size > s.split_log_scale;
  const bool survives =
      g.opacities[row] >= s.min_opacity && (is_split ? size + kLogChildSize : size) <= s.max_log_scale;
  if (!survives) return kDropped;
  return is_split ? kSplit : grows ? kKept | kCloned : kKept;
}

// What a row after growth comes from.
enum OriginKind : int32_t { kStays, kClone, kFirstChild, kSecondChild };
struct Origin {
  int32_t row;
  OriginKind kind;
};
HOST_DEVICE Origin origin_of(const GrowthPlan& plan, int64_t i) {
  const GrowthCounts& n = plan.counts;
  if (i < n.kept) return {plan.sources[i], kStays};
  i -= n.kept;
  if (i < n.clones) return {plan.sources[plan.n_rows + i], kClone};
  i -= n.clones;
  const int32_t* parents = plan.sources + 2 * plan.n_rows;
  return i < n.parents ? Origin{parents[i], kFirstChild} : Origin{parents[i - n.parents], kSecondChild};
}

HOST_DEVICE bool is_finite(float x) {
  return x - x == 0.0f;
}
HOST_DEVICE bool is_finite(const float* values, int64_t n) {
  bool all = true;
  for (int64_t i = 0; i < n; ++i) all &= is_finite(values[i]);
  return all;
}
HOST_DEVICE bool is_finite_row(const Gaussians& g, int64_t row) {
  const int sh = 3 * g.n_coefficients;
  return is_finite(g.means + 3 * row, 3) && is_finite(g.log_scales + 3 * row, 3) &&
         is_finite(g.quaternions + 4 * row, 4) && is_finite(g.opacities[row]) && is_finite(g.sh + sh * row, sh);
}

// The box of all means, and which of its 2^21 cells along each axis a mean lies in; the cells' numbers woven bit by
// bit.
constexpr int kMortonBits = 21;  // an axis
constexpr uint64_t kNowhere = ~uint64_t(0);
struct Box {
  float low[3], high[3];
};
HOST_DEVICE uint64_t spread(uint64_t x) {  // two zeros behind each of 21 bits
  x = (x | x << 32) & 0x001F00000000FFFFu;
  x = (x | x << 16) & 0x001F0000FF0000FFu;
  x = (x | x << 8) & 0x100F00F00F00F00Fu;
  x = (x | x << 4) & 0x10C30C30C30C30C3u;
  return (x | x << 2) & 0x1249249249249249u;
}
HOST_DEVICE uint64_t morton_code(const float* mean, const Box& box) {
  if (!is_finite(mean, 3)) return kNowhere;
  constexpr uint32_t kLast = (1u << kMortonBits) - 1;
  uint64_t code = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const float span = box.high[axis] - box.low[axis];
    const float cell = span > 0.0f ? (mean[axis] - box.low[axis]) / span * float(kLast) : 0.0f;
    code |= spread(cell < float(kLast) ? uint32_t(cell) : kLast) << axis;
  }
  return code;
}

// How likely a row is drawn, in whole numbers, whose sums do not depend on their order: zero for one that moves itself.
HOST_DEVICE uint64_t weight_of(const Gaussians& g, int64_t row, float min_opacity) {
  if (!(g.opacities[row] >= min_opacity) || !is_finite_row(g, row)) return 0;
  return uint64_t(0x1p20 / (1.0 + exp(-double(g.opacities[row])))) + 1;
}
// A number below `total`.
HOST_DEVICE uint64_t draw_below(uint64_t total, const Words& words) {
  const uint64_t fraction = uint64_t(words.word[0]) << 32 | words.word[1];
  return uint64_t(static_cast<unsigned __int128>(total) * fraction >> 64);
}

// One of n Gaussians in the same place that together look as one did (Kheradmand et al., 2024, eq. 9): its opacity is
// 1 - (1 - o)^(1/n), and its size o / sum over k of (-1)^(k-1) C(n, k) opacity^k / sqrt(k) of what it was.
constexpr int kMostCopies = 51;
struct Relocated {
  float opacity;   // logit
  float log_size;  // to add
};
HOST_DEVICE Relocated relocated(float logit, int n_copies) {
  const int n = n_copies < kMostCopies ? n_copies : kMostCopies;
  const double x = logit;
  const double darkening = ((x > 0.0 ? x : 0.0) + log1p(exp(x > 0.0 ? -x : x))) / n;  // -ln(1 - o) / n
  const double opacity = -expm1(-darkening), whole = 1.0 / (1.0 + exp(-x));
  double term = -1.0, sum = 0.0;
  for (int k = 1; k <= n; ++k) {
    term *= -opacity * (n - k + 1) / k;
    sum += term / sqrt(double(k));
  }
  return {float(log(opacity) + darkening), float(log(whole / (sum > whole ? sum : whole)))};
}

// One float after the other, as few rows need it.
HOST_DEVICE void copy_row(const float* from, int64_t from_row, float* to, int64_t to_row, int n_columns) {
  for (int i = 0; i < n_columns; ++i) to[to_row * n_columns + i] = from[from_row * n_columns + i];
}
HOST_DEVICE void copy_row(const Gaussians& from, int64_t from_row, const Gaussians& to, int64_t to_row) {
  copy_row(from.means, from_row, to.means, to_row, 3);
  copy_row(from.log_scales, from_row, to.log_scales, to_row, 3);
  copy_row(from.quaternions, from_row, to.quaternions, to_row, 4);
  copy_row(from.opacities, from_row, to.opacities, to_row, 1);
  copy_row(from.sh, from_row, to.sh, to_row, 3 * from.n_coefficients);
}
HOST_DEVICE void clear_row(const Gaussians& g, int64_t row) {
  for (int i = 0; i < 3; ++i) g.means[3 * row + i] = g.log_scales[3 * row + i] = 0.0f;
  for (int i = 0; i < 4; ++i) g.quaternions[4 * row + i] = 0.0f;
  g.opacities[row] = 0.0f;
  const int sh = 3 * g.n_coefficients;
  for (int i = 0; i < sh; ++i) g.sh[row * sh + i] = 0.0f;
}
// The row becomes one of n copies of what it was; its companions begin again.
HOST_DEVICE void become_copy(const Rows& rows, int64_t row, int n_copies) {
  const Relocated change = relocated(rows.values.opacities[row], n_copies);
  rows.values.opacities[row] = change.opacity;
  for (int i = 0; i < 3; ++i) rows.values.log_scales[3 * row + i] += change.log_size;
  for (int c = 0; c < rows.n_companions; ++c) clear_row(rows.companions[c], row);
}

}  // namespace spaceport::SPACEPORT_ISA
