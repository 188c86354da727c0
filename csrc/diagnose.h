// For benchmarks only: what work a blend holds, and what the machine could do at best.
#pragma once

#include "ops.h"

namespace spaceport {

struct PairCounts {
  int64_t evaluated;  // (splat, pixel) pairs of the tiles' lists before that pixel's stop
  int64_t blended;    // those of them with alpha >= kAlphaCutoff
};
PairCounts count_pairs(const Cpu&, const Projected&, const Tiles&, const Camera&, const RasterSettings&);

// Runs n_pieces times kMultiplyAddFlops floating-point operations on registers alone.
constexpr int64_t kMultiplyAddFlops = int64_t(1) << 28;
void multiply_adds(const Cpu&, int64_t n_pieces);
void multiply_adds(const Cuda&, int64_t n_pieces);  // queued

}  // namespace spaceport
