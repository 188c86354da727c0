// SH coefficients and Adam's moments of them in memory, in both storages (see MomentStorage): one interface, so that a
// kernel is written once.
#pragma once

#include <cstdint>

#include "ops.h"

namespace spaceport {
namespace cuda {

// Values with their moments.
template <class T>
struct Parameter {
  T value, first, second;
};

// What rounds the moments of a step.
struct Rounding {
  uint32_t step;

  // Bits that look random, the same for the same place and step: hashed by multiplications and shifts.
  __device__ uint32_t bits(int64_t row, int column) const {
    uint32_t x = uint32_t(row) * 0x9e3779b1u + uint32_t(column) * 0x85ebca77u + step * 0xc2b2ae3du;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
  }
};

// Two floats.
struct FullSh {
  float *values, *firsts, *seconds;

  static FullSh of(const Gaussians& values, const AdamMoments& m) { return {values.sh, m.first.sh, m.second.sh}; }

  // Four neighbouring columns of a row, the `four`-th ones; rows are of `n_fours`. As they lie in memory: nothing waits
  // for them before they are unpacked.
  using Fetched = Parameter<float4>;
  __device__ Fetched fetch(int64_t row, int n_fours, int four) const {
    const int64_t at = row * n_fours + four;
    return {reinterpret_cast<const float4*>(values)[at], reinterpret_cast<const float4*>(firsts)[at],
            reinterpret_cast<const float4*>(seconds)[at]};
  }
  __device__ static Parameter<float4> unpack(const Fetched& fetched, int) { return fetched; }
  __device__ void store(const Parameter<float4>& p, int64_t row, int n_fours, int four, Rounding) const {
    const int64_t at = row * n_fours + four;
    reinterpret_cast<float4*>(values)[at] = p.value;
    reinterpret_cast<float4*>(firsts)[at] = p.first;
    reinterpret_cast<float4*>(seconds)[at] = p.second;
  }
  // One column of a row of `n_columns`.
  __device__ Parameter<float> load_one(int64_t row, int n_columns, int column) const {
    const int64_t at = row * n_columns + column;
    return {values[at], firsts[at], seconds[at]};
  }
  __device__ void store_one(const Parameter<float>& p, int64_t row, int n_columns, int column, Rounding) const {
    const int64_t at = row * n_columns + column;
    values[at] = p.value;
    firsts[at] = p.first;
    seconds[at] = p.second;
  }
};

// Two bfloat16 in a word; two floats of the constant coefficient. Words are rounded up or down at random, in proportion
// to how near they lie: to the nearest, an average that moves by less than half a step would never move.
struct CompactSh {
  static constexpr int kConstant = 3;  // columns of the constant coefficient
  float* values;
  uint32_t* words;          // [N, K, 3]; of the constant coefficient the first moment
  float* constant_seconds;  // [N, 3]

  static CompactSh of(const Gaussians& values, const AdamMoments& m) {
    return {values.sh, reinterpret_cast<uint32_t*>(m.first.sh), m.second.sh};
  }

  struct Fetched {
    float4 value;
    uint4 words;
    float constant[kConstant];  // second moments
  };
  __device__ Fetched fetch(int64_t row, int n_fours, int four) const {
    const int64_t at = row * n_fours + four;
    Fetched f = {reinterpret_cast<const float4*>(values)[at], reinterpret_cast<const uint4*>(words)[at], {}};
    if (four == 0) {
#pragma unroll
      for (int i = 0; i < kConstant; ++i) f.constant[i] = constant_seconds[row * kConstant + i];
    }
    return f;
  }
  __device__ static Parameter<float4> unpack(const Fetched& f, int four) {
    const uint4& w = f.words;
    Parameter<float4> p = {f.value,
                           {first_of(w.x), first_of(w.y), first_of(w.z), first_of(w.w)},
                           {second_of(w.x), second_of(w.y), second_of(w.z), second_of(w.w)}};
    if (four == 0) {
      p.first = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), p.first.w};
      p.second = {f.constant[0], f.constant[1], f.constant[2], p.second.w};
    }
    return p;
  }
  __device__ void store(const Parameter<float4>& p, int64_t row, int n_fours, int four, Rounding r) const {
    const int64_t at = row * n_fours + four;
    const int column = 4 * four;
    const bool is_constant = four == 0;
    const auto word = [&](float first, float second, int i) {
      return is_constant ? __float_as_uint(first) : word_of(first, second, r.bits(row, column + i));
    };
    reinterpret_cast<float4*>(values)[at] = p.value;
    reinterpret_cast<uint4*>(words)[at] = {word(p.first.x, p.second.x, 0), word(p.first.y, p.second.y, 1),
                                           word(p.first.z, p.second.z, 2),
                                           word_of(p.first.w, p.second.w, r.bits(row, column + 3))};
    if (is_constant) {
      float* seconds = constant_seconds + row * kConstant;
      seconds[0] = p.second.x;
      seconds[1] = p.second.y;
      seconds[2] = p.second.z;
    }
  }
  __device__ Parameter<float> load_one(int64_t row, int n_columns, int column) const {
    const int64_t at = row * n_columns + column;
    const uint32_t word = words[at];
    if (column < kConstant) {
      return {values[at], __uint_as_float(word), constant_seconds[row * kConstant + column]};
    }
    return {values[at], first_of(word), second_of(word)};
  }
  __device__ void store_one(const Parameter<float>& p, int64_t row, int n_columns, int column, Rounding r) const {
    const int64_t at = row * n_columns + column;
    values[at] = p.value;
    if (column < kConstant) {
      words[at] = __float_as_uint(p.first);
      constant_seconds[row * kConstant + column] = p.second;
    } else {
      words[at] = word_of(p.first, p.second, r.bits(row, column));
    }
  }

 private:
  __device__ static float first_of(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ static float second_of(uint32_t word) { return __uint_as_float(word << 16); }
  // A bfloat16 is the upper half of a float; what is added to the lower half carries over as often as it should.
  __device__ static uint32_t word_of(float first, float second, uint32_t bits) {
    const uint32_t upper = (__float_as_uint(first) + (bits & 0xffffu)) & 0xffff0000u;
    return upper | (__float_as_uint(second) + (bits >> 16)) >> 16;
  }
};

// Calls launch(FullSh or CompactSh).
template <class Launch>
void for_storage(const Gaussians& values, const AdamMoments& moments, Launch&& launch) {
  if (moments.storage == MomentStorage::kFull) {
    launch(FullSh::of(values, moments));
  } else {
    launch(CompactSh::of(values, moments));
  }
}

}  // namespace cuda
}  // namespace spaceport
