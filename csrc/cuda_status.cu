// Whether a GPU can be used here, in words.
#include "cuda_status.h"

#include <cuda_runtime.h>

namespace spaceport {

std::string cuda_status() {
  int n_devices = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && n_devices > 0) return "";
  if (driver == 0) return "no NVIDIA driver";
  if (error == cudaErrorInsufficientDriver) {
    const auto text = [](int version) {
      return std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
    };
    return "the NVIDIA driver is for CUDA " + text(driver) + ", this build needs " + text(CUDART_VERSION);
  }
  return error == cudaSuccess || error == cudaErrorNoDevice ? "no NVIDIA GPU" : cudaGetErrorString(error);
}

int current_cuda_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

}  // namespace spaceport
