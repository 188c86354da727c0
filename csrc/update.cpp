// update: Adam over all rows, every moment at every step.
#include "kernels.h"
#include "simd.h"

namespace spaceport::SPACEPORT_ISA {

namespace {

constexpr int kLanes = 8;
constexpr int64_t kValuesPerPiece = 1 << 15;

// One table of parameters with its gradient and moments, each [n].
struct Table {
  float* values;
  const float* gradient;
  float* first;
  float* second;
  int64_t n;
};

struct Rates {
  float beta1, beta2, epsilon;
  float first_correction, second_correction;  // 1 / (1 - beta^step)
};

// Learning rates of eight neighbouring values; they repeat with `period` values, the first `n_leading` being special.
struct LearningRate {
  float leading, rest;
  int64_t n_leading, period;

  HOST_DEVICE float at(int64_t i) const { return i % period < n_leading ? leading : rest; }
};

HOST_DEVICE void update_vector(const Table& t, int64_t i, Float8 rate, const Rates& r) {
  const Float8 one(1.0f), beta1(r.beta1), beta2(r.beta2);
  const Float8 g = load(t.gradient + i);
  const Float8 m = multiply_add(beta1, load(t.first + i), (one - beta1) * g);
  const Float8 v = multiply_add(beta2, load(t.second + i), (one - beta2) * g * g);
  store(t.first + i, m);
  store(t.second + i, v);
  const Float8 step =
      rate * (m * Float8(r.first_correction)) / (square_root(v * Float8(r.second_correction)) + Float8(r.epsilon));
  store(t.values + i, load(t.values + i) - step);
}

// Fewer than eight values, through a padded copy.
void update_tail(const Table& t, int64_t i, int64_t n, Float8 rate, const Rates& r) {
  float values[kLanes] = {}, gradient[kLanes] = {}, first[kLanes] = {}, second[kLanes] = {};
  const size_t size = size_t(n) * sizeof(float);
  std::memcpy(values, t.values + i, size);
  std::memcpy(gradient, t.gradient + i, size);
  std::memcpy(first, t.first + i, size);
  std::memcpy(second, t.second + i, size);
  update_vector({values, gradient, first, second, kLanes}, 0, rate, r);
  std::memcpy(t.values + i, values, size);
  std::memcpy(t.first + i, first, size);
  std::memcpy(t.second + i, second, size);
}

void update_table(const Cpu& cpu, const Table& t, const LearningRate& learning_rate, const Rates& r) {
  parallel_for(*cpu.pool, n_pieces_of(t.n, kValuesPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, t.n, kValuesPerPiece);
    const bool uniform = learning_rate.leading == learning_rate.rest;
    for (int64_t i = range.begin; i < range.end; i += kLanes) {
      Float8 rate(learning_rate.rest);
      if (!uniform) {
        float lanes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = learning_rate.at(i + lane);
        rate = load(lanes);
      }
      const int64_t n = range.end - i;
      if (n >= kLanes) {
        update_vector(t, i, rate, r);
      } else {
        update_tail(t, i, n, rate, r);
      }
    }
  });
}

}  // namespace

void update(const Cpu& cpu, const Gaussians& values, const Gaussians& gradient, const Gaussians& first,
            const Gaussians& second, const AdamSettings& a) {
  const double steps = double(a.step);
  const Rates rates = {a.beta1, a.beta2, a.epsilon, float(1.0 / (1.0 - pow(double(a.beta1), steps))),
                       float(1.0 / (1.0 - pow(double(a.beta2), steps)))};
  const auto uniform = [](float rate) { return LearningRate{rate, rate, 1, 1}; };
  const int64_t n = values.n, sh = int64_t(values.n_coefficients) * 3;
  update_table(cpu, {values.means, gradient.means, first.means, second.means, 3 * n}, uniform(a.means), rates);
  update_table(cpu, {values.log_scales, gradient.log_scales, first.log_scales, second.log_scales, 3 * n},
               uniform(a.log_scales), rates);
  update_table(cpu, {values.quaternions, gradient.quaternions, first.quaternions, second.quaternions, 4 * n},
               uniform(a.quaternions), rates);
  update_table(cpu, {values.opacities, gradient.opacities, first.opacities, second.opacities, n}, uniform(a.opacities),
               rates);
  update_table(cpu, {values.sh, gradient.sh, first.sh, second.sh, sh * n}, {a.sh_dc, a.sh_rest, 3, sh}, rates);
}

}  // namespace spaceport::SPACEPORT_ISA
