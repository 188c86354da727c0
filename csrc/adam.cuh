// One value's step of Adam (Kingma and Ba, 2015), as update and the fused backward pass do it.
#pragma once

#include <cmath>

#include "ops.h"

namespace spaceport {
namespace cuda {

struct AdamRates {
  float beta1, beta2, epsilon;
  float first_correction, second_correction;  // 1 / (1 - beta^step)
  float log2_beta1, log2_beta2;

  static AdamRates of(const AdamSettings& a) {
    const double steps = double(a.step);
    return {a.beta1,
            a.beta2,
            a.epsilon,
            float(1.0 / (1.0 - std::pow(double(a.beta1), steps))),
            float(1.0 / (1.0 - std::pow(double(a.beta2), steps))),
            float(std::log2(double(a.beta1))),
            float(std::log2(double(a.beta2)))};
  }
};

__device__ __forceinline__ void adam(float& value, float gradient, float& first, float& second, float rate,
                                     const AdamRates& r) {
  first = fmaf(r.beta1, first, (1.0f - r.beta1) * gradient);
  second = fmaf(r.beta2, second, (1.0f - r.beta2) * gradient * gradient);
  value -= rate * (first * r.first_correction) / (sqrtf(second * r.second_correction) + r.epsilon);
}

}  // namespace cuda
}  // namespace spaceport
