// What the maths of a Gaussian asks of its number type, for plain floats: one Gaussian a CUDA thread.
#pragma once

#include <cmath>

#include "device.h"

namespace spaceport::SPACEPORT_ISA {

HOST_DEVICE float select(bool condition, float a, float b) {
  return condition ? a : b;
}
HOST_DEVICE float square_root(float x) {
  return sqrtf(x);
}
// e^x, with x held to where the result is a normal float.
HOST_DEVICE float exponential(float x) {
  return expf(select(x < -87.0f, -87.0f, select(x > 87.0f, 87.0f, x)));
}

}  // namespace spaceport::SPACEPORT_ISA
