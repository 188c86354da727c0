// Sums of a splat's gradient in an order that is always the same: blend' leaves one row for each instance that reached
// a pixel, and those of a splat are added up as they follow each other in the tiles' lists.
#pragma once

#include "launch.cuh"

namespace spaceport {
namespace cuda {

constexpr uint32_t kNoSplat = 0xffffffffu;

struct InstanceSums {
  uint32_t* splats;    // [I] whose they are; kNoSplat where no pixel was reached
  int32_t* instances;  // [I] 0, 1, 2, ... where there is a splat
  float* rows;         // [I, n_columns], likewise
  int64_t n;           // I
  int n_columns;

  static InstanceSums of(Arena& arena, int64_t n_instances, int n_columns) {
    return {arena.take<uint32_t>(n_instances), arena.take<int32_t>(n_instances),
            arena.take<float>(n_instances * n_columns), n_instances, n_columns};
  }
};

// Nobody's, before blend' fills them in.
void queue_clear(cudaStream_t, const InstanceSums&);

// Writes the rows [M, n_columns] of the splats that have instances, and no others.
size_t queued_add_up_scratch(int64_t n_splats, int64_t n_instances);
void queue_add_up(cudaStream_t, const InstanceSums&, int64_t n_splats, void* scratch, float* of_splats);

}  // namespace cuda
}  // namespace spaceport
