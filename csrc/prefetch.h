// Splats are read in the order of their depths, which is no order of memory: without asking ahead, every one is a miss.
#pragma once

#include "types.h"

namespace spaceport {

inline void prefetch(const Splat& splat) {
  __builtin_prefetch(&splat);
  __builtin_prefetch(&splat.extent_y);  // it may lie across two cache lines
}

}  // namespace spaceport
