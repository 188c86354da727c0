// morton_order: rows along a curve that keeps neighbours in space together.
#define SPACEPORT_ISA portable

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "growth_math.h"

namespace spaceport {

size_t morton_order_scratch(const Cpu&, int64_t) {
  return 0;
}

void morton_order(const Cpu& cpu, const Points& means, void*, int32_t* order) {
  constexpr int64_t kRowsPerPiece = 1 << 14;
  constexpr float kFar = std::numeric_limits<float>::infinity();
  portable::Box box = {{kFar, kFar, kFar}, {-kFar, -kFar, -kFar}};
  for (int64_t i = 0; i < means.n; ++i) {
    if (!portable::is_finite(means.values + 3 * i, 3)) continue;
    for (int axis = 0; axis < 3; ++axis) {
      box.low[axis] = std::min(box.low[axis], means.values[3 * i + axis]);
      box.high[axis] = std::max(box.high[axis], means.values[3 * i + axis]);
    }
  }
  std::vector<std::pair<uint64_t, int32_t>> rows(size_t(means.n));
  parallel_for(*cpu.pool, n_pieces_of(means.n, kRowsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, means.n, kRowsPerPiece);
    for (int64_t i = range.begin; i < range.end; ++i)
      rows[size_t(i)] = {portable::morton_code(means.values + 3 * i, box), int32_t(i)};
  });
  std::sort(rows.begin(), rows.end());  // equal codes by their rows
  for (int64_t i = 0; i < means.n; ++i) order[i] = rows[size_t(i)].second;
}

}  // namespace spaceport
