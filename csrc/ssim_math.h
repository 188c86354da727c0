// The structural similarity of one place, and its derivatives (Wang et al. 2004); for float and for Float8.
#pragma once

#include "device.h"
#include "ops.h"

namespace spaceport::SPACEPORT_ISA {

constexpr int kTaps = kSsimWindow;
constexpr int kRadius = kTaps / 2;
constexpr int kChannels = 3;
constexpr int kExposureSize = kChannels * (kChannels + 1);
// exp(-x^2 / (2 1.5^2)), normalised
CONSTANT_TABLE float kWindow[kTaps] = {0.00102838f, 0.00759876f, 0.03600077f, 0.10936069f, 0.21300554f, 0.26601172f,
                                       0.21300554f, 0.10936069f, 0.03600077f, 0.00759876f, 0.00102838f};
constexpr float kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;

template <class T>
struct SsimDerivatives {
  T ssim, by_mean, by_square, by_product;
};

// SSIM from the local E[x], E[y], E[x^2], E[y^2], E[x y], and its derivatives by E[x], E[x^2] and E[x y].
template <class T>
HOST_DEVICE SsimDerivatives<T> ssim_of(const T moments[5]) {
  const T zero(0.0f), one(1.0f), two(2.0f), c1(kC1), c2(kC2);
  const T x = moments[0], y = moments[1];
  const T a1 = two * x * y + c1, a2 = two * (moments[4] - x * y) + c2;
  const T b1 = x * x + y * y + c1, b2 = moments[2] - x * x + moments[3] - y * y + c2;
  const T inverse_b1 = one / b1, inverse_b2 = one / b2;
  const T inverse = inverse_b1 * inverse_b2;
  const T ssim = a1 * a2 * inverse;
  return {ssim, two * (y * (a2 - a1) * inverse - x * ssim * (inverse_b1 - inverse_b2)), zero - ssim * inverse_b2,
          two * a1 * inverse};
}

// How many pixels at each side of an image have no say in the mean of SSIM.
HOST_DEVICE int margin_of(SsimPadding padding) {
  return padding == SsimPadding::kValid ? kRadius : 0;
}

// A channel of a pixel's colour [3] behind an exposure [3, 4].
HOST_DEVICE float exposed(const float* exposure, const float* color, int channel) {
  const float* row = exposure + channel * (kChannels + 1);
  return row[0] * color[0] + row[1] * color[1] + row[2] * color[2] + row[3];
}
// A channel of the gradient by that colour; `d` [3] is by the colour behind the exposure.
HOST_DEVICE float exposed_vjp(const float* exposure, const float* d, int channel) {
  const float* column = exposure + channel;
  return column[0] * d[0] + column[kChannels + 1] * d[1] + column[2 * (kChannels + 1)] * d[2];
}

}  // namespace spaceport::SPACEPORT_ISA
