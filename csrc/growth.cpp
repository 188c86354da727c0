// growth: which rows stay, are cloned and are split, and the rows that come of it.
#define SPACEPORT_ISA portable

#include <algorithm>
#include <cstring>
#include <vector>

#include "growth_math.h"

namespace spaceport {

namespace {

using namespace portable;

constexpr int64_t kRowsPerPiece = 1 << 12;

// The rows that may grow where not all can: the highest scores, the first of equal ones.
std::vector<int32_t> chosen_rows(const float* scores, int64_t n, const GrowthSettings& s) {
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] >= s.threshold) rows.push_back(int32_t(i));
  }
  const auto budget = size_t(std::max<int64_t>(s.max_rows - n, 0));
  if (s.max_rows > 0 && budget < rows.size()) {
    const auto comes_first = [&](int32_t a, int32_t b) {
      return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    };
    std::nth_element(rows.begin(), rows.begin() + int64_t(budget), rows.end(), comes_first);
    rows.resize(budget);
  }
  return rows;
}

}  // namespace

size_t plan_growth_scratch(const Cpu&, int64_t n_gaussians) {
  return size_t(n_gaussians);
}

GrowthCounts plan_growth(const Cpu& cpu, const Gaussians& g, const float* scores, const GrowthSettings& settings,
                         void* scratch, int32_t* sources) {
  auto* fates = static_cast<uint8_t*>(scratch);
  std::memset(fates, 0, size_t(g.n));
  for (int32_t row : chosen_rows(scores, g.n, settings)) fates[row] = 1;
  parallel_for(*cpu.pool, n_pieces_of(g.n, kRowsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, g.n, kRowsPerPiece);
    for (int64_t i = range.begin; i < range.end; ++i)
      fates[i] = uint8_t(is_finite_row(g, i) ? fate_of(g, i, fates[i] != 0, settings) : kDropped);
  });
  GrowthCounts counts = {};
  for (int64_t i = 0; i < g.n; ++i) {
    if (fates[i] & kKept) sources[counts.kept++] = int32_t(i);
    if (fates[i] & kCloned) sources[g.n + counts.clones++] = int32_t(i);
    if (fates[i] & kSplit) sources[2 * g.n + counts.parents++] = int32_t(i);
  }
  return counts;
}

void grow(const Cpu& cpu, const Rows& rows, const GrowthPlan& plan, const DrawKey& key, const Rows& out) {
  const Gaussians& to = out.values;
  parallel_for(*cpu.pool, n_pieces_of(to.n, kRowsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, to.n, kRowsPerPiece);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Origin origin = origin_of(plan, i);
      copy_row(rows.values, origin.row, to, i);
      if (origin.kind >= kFirstChild) {
        const Vec3<float> offset = child_offset(rows.values, origin.row, uint32_t(origin.kind - kFirstChild), key);
        to.means[3 * i] += offset.x;
        to.means[3 * i + 1] += offset.y;
        to.means[3 * i + 2] += offset.z;
        for (int k = 0; k < 3; ++k) to.log_scales[3 * i + k] += kLogChildSize;
      }
      for (int c = 0; c < rows.n_companions; ++c) {
        if (origin.kind == kStays) {
          copy_row(rows.companions[c], origin.row, out.companions[c], i);
        } else {
          clear_row(out.companions[c], i);
        }
      }
    }
  });
}

void select_rows(const Cpu& cpu, const Rows& rows, const int32_t* selected, const Rows& out) {
  const GrowthPlan all_stay = {const_cast<int32_t*>(selected), rows.values.n, {out.values.n, 0, 0}};
  grow(cpu, rows, all_stay, {}, out);
}

}  // namespace spaceport
