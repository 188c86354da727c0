// relocate: rows that nobody sees move onto others.
#define SPACEPORT_ISA portable

#include <algorithm>
#include <cstring>

#include "growth_math.h"

namespace spaceport {

namespace {

using namespace portable;

// [N] each.
struct RelocateScratch {
  uint64_t* sums;    // of the weights, up to and with each row
  int32_t* sources;  // what a row moves onto; -1: it stays
  int32_t* copies;   // rows that move onto it

  static RelocateScratch of(void* memory, int64_t n) {
    auto* sums = static_cast<uint64_t*>(memory);
    auto* sources = reinterpret_cast<int32_t*>(sums + n);
    return {sums, sources, sources + n};
  }
};

}  // namespace

size_t relocate_scratch(const Cpu&, int64_t n_gaussians) {
  return size_t(n_gaussians) * (sizeof(uint64_t) + 2 * sizeof(int32_t));
}

void relocate(const Cpu& cpu, const Rows& rows, const Relocation& settings, void* scratch) {
  constexpr int64_t kRowsPerPiece = 1 << 12;
  const Gaussians& g = rows.values;
  const RelocateScratch s = RelocateScratch::of(scratch, g.n);
  const auto for_rows = [&](auto&& visit) {
    parallel_for(*cpu.pool, n_pieces_of(g.n, kRowsPerPiece), [&](int64_t piece) {
      const Range range = range_of(piece, g.n, kRowsPerPiece);
      for (int64_t i = range.begin; i < range.end; ++i) visit(i);
    });
  };
  for_rows([&](int64_t i) {
    s.sums[i] = weight_of(g, i, settings.min_opacity);
    s.sources[i] = s.sums[i] > 0 ? -1 : 0;
  });
  for (int64_t i = 1; i < g.n; ++i) s.sums[i] += s.sums[i - 1];
  if (g.n == 0 || s.sums[g.n - 1] == 0) return;
  for_rows([&](int64_t i) {
    if (s.sources[i] < 0) return;
    const uint64_t drawn = draw_below(s.sums[g.n - 1], draw(settings.key, kDrawSource, i, 0));
    s.sources[i] = int32_t(std::upper_bound(s.sums, s.sums + g.n, drawn) - s.sums);
  });
  std::memset(s.copies, 0, size_t(g.n) * sizeof(int32_t));
  for (int64_t i = 0; i < g.n; ++i) {
    if (s.sources[i] >= 0) ++s.copies[s.sources[i]];
  }
  for_rows([&](int64_t i) {
    if (s.sources[i] < 0) return;
    copy_row(g, s.sources[i], g, i);
    become_copy(rows, i, 1 + s.copies[s.sources[i]]);
  });
  for_rows([&](int64_t i) {
    if (s.copies[i] > 0) become_copy(rows, i, 1 + s.copies[i]);
  });
}

}  // namespace spaceport
