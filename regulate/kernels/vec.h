// Vectors of floats and the two activations. NaN and infinity come out as they would elsewhere: no -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#ifdef __SSE__
#include <immintrin.h>
#endif

namespace {

// As wide as the registers that this is compiled for. A wider vector would be right as well, but compilers break its
// comparisons and selections into single floats.
#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr char INSTRUCTION_SET[] = "AVX-512";
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr char INSTRUCTION_SET[] = "AVX2";
#elif defined(__SSE2__)
constexpr int LANES = 4;
constexpr char INSTRUCTION_SET[] = "SSE2";
#elif defined(__ARM_NEON)
constexpr int LANES = 4;
constexpr char INSTRUCTION_SET[] = "NEON";
#else
constexpr int LANES = 4;
constexpr char INSTRUCTION_SET[] = "generic";
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float quarter __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* p) { return *(const loose*)p; }
INLINE void store(float* p, vec v) { *(loose*)p = v; }
INLINE vec broadcast(float v) { return vec{} + v; }

// v where the mask's bits are set, else zero, NaN and infinity included: a product with zero would keep them.
INLINE vec masked(vec v, const float* mask) { return (vec)((ivec)v & (ivec)load(mask)); }

INLINE float total(vec v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += v[lane];
  return sum;
}

// exp(x) = 2^n exp(r), |r| <= ln(2)/2, by the Taylor polynomial of degree 7. Clamped where floats end; NaN stays NaN.
INLINE vec exponential(vec x) {
  x = x > 87.0f ? broadcast(87.0f) : x;
  x = x < -87.0f ? broadcast(-87.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  vec shifted = x * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  ivec exponent = ((ivec)shifted - 0x4B400000 + 127) << 23;
  return p * (vec)exponent;
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

// Odd Taylor polynomial near zero, where 1 - 2 / (1 + exp(2x)) would lose its digits.
INLINE vec hyperbolic(vec x) {
  vec s = x * x;
  vec p = s * (-1382.0f / 155925) + 62.0f / 2835;
  p = p * s - 17.0f / 315;
  p = p * s + 2.0f / 15;
  p = p * s - 1.0f / 3;
  vec small = x + x * s * p;
  vec large = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
  return s < 0.1f ? small : large;
}

// Numbers below the normal range count as zero while this lives: saturated gates make them all the time, and
// processors take many times as long to compute with them.
struct Flush {
#ifdef __SSE__
  unsigned before = _mm_getcsr();
  Flush() { _mm_setcsr(before | 0x8040); }  // flush to zero, denormals are zero
  ~Flush() { _mm_setcsr(before); }
#endif
};

// Copies a row. Rows are short, a call of memcpy would cost more than the copy: the last part overlaps the one before.
INLINE void copy(float* to, const float* from, int64_t count) {
  const int64_t part = count >= LANES ? LANES : 4;
  if (count < part) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0;; i += part) {
    if (i > count - part) i = count - part;
    if (part == LANES) store(to + i, load(from + i));
    else *(quarter*)(to + i) = *(const quarter*)(from + i);
    if (i == count - part) return;
  }
}

}  // namespace
