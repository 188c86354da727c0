// What the lanes of a warp do together. A T4 (compute capability 7.5) lacks some of it; SPACEPORT_CUDA_FALLBACKS makes
// newer cards take its way, so that it is tested on them.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(SPACEPORT_CUDA_FALLBACKS)
#define SPACEPORT_HAS_REDUX 1
#else
#define SPACEPORT_HAS_REDUX 0
#endif

namespace spaceport {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The same value, of which the compiler knows nothing: it keeps it, where it would work it out anew in a loop.
__device__ inline uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
template <class T>
__device__ T* kept(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Of an address in shared memory.
__device__ inline void store_shared(uint32_t address, const float4& value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}
__device__ inline float4 load_shared(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

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

// Sum over the lanes up to this one.
__device__ inline uint32_t warp_sum_so_far(uint32_t value) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

}  // namespace cuda
}  // namespace spaceport
