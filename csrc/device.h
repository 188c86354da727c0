// HOST_DEVICE marks the maths that g++ and nvcc both compile.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
