// Float8: eight floats that the compiler maps to what the instruction set has (one AVX register, two SSE or NEON
// registers).
//
// Files that include this are compiled once per instruction set, inside a namespace of its name, and use nothing of the
// standard library that has a body: so no function compiled for AVX2 can be linked into the portable path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "device.h"

namespace spaceport::SPACEPORT_ISA {

struct Float8 {
  typedef float Vector __attribute__((vector_size(32)));
  Vector v;

  Float8() = default;
  HOST_DEVICE Float8(Vector vector) : v(vector) {}
  HOST_DEVICE explicit Float8(float x) : v{x, x, x, x, x, x, x, x} {}
};

// Lanes are all ones or all zeros.
struct Mask8 {
  typedef int32_t Vector __attribute__((vector_size(32)));
  Vector v;
};

HOST_DEVICE Float8 operator+(Float8 a, Float8 b) {
  return a.v + b.v;
}
HOST_DEVICE Float8 operator-(Float8 a, Float8 b) {
  return a.v - b.v;
}
HOST_DEVICE Float8 operator*(Float8 a, Float8 b) {
  return a.v * b.v;
}
HOST_DEVICE Float8 operator/(Float8 a, Float8 b) {
  return a.v / b.v;
}
HOST_DEVICE Mask8 operator<(Float8 a, Float8 b) {
  return {a.v < b.v};
}
HOST_DEVICE Mask8 operator>(Float8 a, Float8 b) {
  return {a.v > b.v};
}
HOST_DEVICE Mask8 operator>=(Float8 a, Float8 b) {
  return {a.v >= b.v};
}
HOST_DEVICE Mask8 operator==(Float8 a, Float8 b) {
  return {a.v == b.v};
}
HOST_DEVICE Mask8 operator&(Mask8 a, Mask8 b) {
  return {a.v & b.v};
}

HOST_DEVICE Mask8 bits_of(Float8 a) {
  Mask8 m;
  std::memcpy(&m.v, &a.v, 32);
  return m;
}
HOST_DEVICE Float8 float_of(Mask8 m) {
  Float8 a;
  std::memcpy(&a.v, &m.v, 32);
  return a;
}
// a where the mask is set, else zero.
HOST_DEVICE Float8 masked(Mask8 mask, Float8 a) {
  return float_of({mask.v & bits_of(a).v});
}

HOST_DEVICE Float8 absolute(Float8 a) {
  return float_of({bits_of(a).v & 0x7fffffff});
}

HOST_DEVICE Float8 load(const float* p) {
  Float8 a;
  std::memcpy(&a.v, p, 32);
  return a;
}
HOST_DEVICE void store(float* p, Float8 a) {
  std::memcpy(p, &a.v, 32);
}

#ifdef __AVX2__
HOST_DEVICE Float8 select(Mask8 mask, Float8 a, Float8 b) {
  return Float8::Vector(_mm256_blendv_ps(__m256(b.v), __m256(a.v), _mm256_castsi256_ps(__m256i(mask.v))));
}
HOST_DEVICE bool any(Mask8 mask) {
  return _mm256_movemask_ps(_mm256_castsi256_ps(__m256i(mask.v))) != 0;
}
// a * b + c in one rounding.
HOST_DEVICE Float8 multiply_add(Float8 a, Float8 b, Float8 c) {
  return Float8::Vector(_mm256_fmadd_ps(__m256(a.v), __m256(b.v), __m256(c.v)));
}
HOST_DEVICE Float8 square_root(Float8 a) {
  return Float8::Vector(_mm256_sqrt_ps(__m256(a.v)));
}
HOST_DEVICE Float8 minimum(Float8 a, Float8 b) {
  return Float8::Vector(_mm256_min_ps(__m256(a.v), __m256(b.v)));
}
HOST_DEVICE float sum(Float8 a) {
  const __m256 v = __m256(a.v);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// rows[i] lane j becomes rows[j] lane i.
HOST_DEVICE void transpose(Float8 rows[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(__m256(rows[i].v), __m256(rows[i + 1].v));
    a[i + 1] = _mm256_unpackhi_ps(__m256(rows[i].v), __m256(rows[i + 1].v));
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = Float8::Vector(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    rows[i + 4] = Float8::Vector(_mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}
#else
HOST_DEVICE Float8 select(Mask8 mask, Float8 a, Float8 b) {
  return float_of({(mask.v & bits_of(a).v) | (~mask.v & bits_of(b).v)});
}
HOST_DEVICE bool any(Mask8 mask) {
  int64_t words[4];
  std::memcpy(words, &mask.v, 32);
  return (words[0] | words[1] | words[2] | words[3]) != 0;
}
// a * b + c, in two roundings.
HOST_DEVICE Float8 multiply_add(Float8 a, Float8 b, Float8 c) {
  return a.v * b.v + c.v;
}
HOST_DEVICE Float8 square_root(Float8 a) {
  for (int i = 0; i < 8; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
HOST_DEVICE Float8 minimum(Float8 a, Float8 b) {
  return select(a < b, a, b);
}
HOST_DEVICE float sum(Float8 a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
// rows[i] lane j becomes rows[j] lane i.
HOST_DEVICE void transpose(Float8 rows[8]) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < i; ++j) {
      const float lower = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = lower;
    }
  }
}
#endif

// 2^x for |x| <= 126: x = whole + part with |part| <= 1/2, 2^part as a polynomial of degree 5 (minimax, relative error
// below 2e-7 with rounding), the whole part added to the exponent.
HOST_DEVICE Float8 exponential_base2(Float8 x) {
  const Float8 rounder(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float8 shifted = x + rounder;
  const Float8 part = x - (shifted - rounder);
  Float8 p(1.32647e-3f);
  p = multiply_add(p, part, Float8(9.67151e-3f));
  p = multiply_add(p, part, Float8(5.550734e-2f));
  p = multiply_add(p, part, Float8(2.4022242e-1f));
  p = multiply_add(p, part, Float8(6.9314698e-1f));
  p = multiply_add(p, part, Float8(1.0f));
  return float_of({bits_of(p).v + (bits_of(shifted).v << 23)});
}

// e^x, with x held to where the result is a normal float.
HOST_DEVICE Float8 exponential(Float8 x) {
  const Float8 low(-87.0f), high(87.0f);
  const Float8 held = select(x < low, low, select(x > high, high, x));
  return exponential_base2(held * Float8(1.44269504f));
}

}  // namespace spaceport::SPACEPORT_ISA
