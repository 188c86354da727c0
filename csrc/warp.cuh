// What the lanes of a warp do together. A T4 (compute capability 7.5) lacks some of it; SPACEPORT_CUDA_FALLBACKS makes
// newer cards take its way, so that it is tested on them.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(SPACEPORT_CUDA_FALLBACKS)
#define SPACEPORT_HAS_REDUX 1
#else
#define SPACEPORT_HAS_REDUX 0
#endif

namespace spaceport {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline unsigned warp_or(unsigned bits) {
#if SPACEPORT_HAS_REDUX
  return __reduce_or_sync(kAllLanes, bits);
#else
  for (int distance = 16; distance > 0; distance /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  return bits;
#endif
}

// The same in all lanes.
__device__ inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

}  // namespace cuda
}  // namespace spaceport
