// How the host side of the CUDA backend launches, checks and divides memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace spaceport {

inline cudaStream_t stream_of(const Cuda& cuda) {
  return static_cast<cudaStream_t>(cuda.stream);
}

// Throws std::runtime_error with what CUDA says of it.
inline void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error));
}
inline void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

inline unsigned n_blocks_of(int64_t n, int64_t per_block) {
  return unsigned((n + per_block - 1) / per_block);
}

// Blocks that a multiprocessor shall hold at least, for __launch_bounds__: where it cannot hold as many threads, the
// compiler would take no heed of it at all.
constexpr int at_least(int n_blocks, int n_threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr int kMostThreads = 1024;
#else
  constexpr int kMostThreads = 1536;
#endif
  return n_blocks * n_threads <= kMostThreads ? n_blocks : kMostThreads / n_threads;
}

// Hands out parts of one piece of memory, each aligned for any use; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(n) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t used_ = 0;
};

}  // namespace spaceport
