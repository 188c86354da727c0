#pragma once

#include <string>

namespace spaceport {

// Empty if a GPU can be used by this build, else why not.
std::string cuda_status();

}  // namespace spaceport
