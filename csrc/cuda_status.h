#pragma once

#include <string>

namespace spaceport {

// Empty if a GPU can be used by this build, else why not.
std::string cuda_status();

// Number of the device that is current in this thread.
int current_cuda_device();

}  // namespace spaceport
