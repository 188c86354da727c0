// HOST_DEVICE marks the maths that g++ and nvcc both compile, CONSTANT_TABLE the arrays of numbers in it.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define CONSTANT_TABLE __device__ constexpr
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#define CONSTANT_TABLE constexpr
#endif

namespace spaceport {

// As the instructions do it: the second argument where one is NaN.
HOST_DEVICE float smaller(float a, float b) {
  return a < b ? a : b;
}
HOST_DEVICE float larger(float a, float b) {
  return a > b ? a : b;
}

// For |x| < 2^31.
HOST_DEVICE int floor_of(float x) {
  const int i = int(x);
  return i - (x < float(i));
}
HOST_DEVICE int ceiling_of(float x) {
  const int i = int(x);
  return i + (x > float(i));
}

}  // namespace spaceport
