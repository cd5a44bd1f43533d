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

// x within [-limit, limit]; NaN stays NaN: of two operands the instructions below take the second, if one is NaN.
INLINE vec clamped(vec x, float limit) {
#if defined(__AVX512F__)
  return (vec)_mm512_min_ps(_mm512_set1_ps(limit), _mm512_max_ps(_mm512_set1_ps(-limit), (__m512)x));
#elif defined(__AVX2__)
  return (vec)_mm256_min_ps(_mm256_set1_ps(limit), _mm256_max_ps(_mm256_set1_ps(-limit), (__m256)x));
#elif defined(__SSE2__)
  return (vec)_mm_min_ps(_mm_set1_ps(limit), _mm_max_ps(_mm_set1_ps(-limit), (__m128)x));
#else
  x = x > limit ? broadcast(limit) : x;
  return x < -limit ? broadcast(-limit) : x;
#endif
}

// exp(factor x) = scale (1 + rest), where scale is the power of two that leaves |rest| below 0.42. Of x / ln(2), n is
// the nearest integer and r what is left; rest is 2^r - 1 by the polynomial of degree 6 whose largest relative error is
// least, 2e-8 (Remez). Two activations need rest by itself, where exp(x) - 1 would lose its digits.
struct Exponential {
  vec scale, rest;
};

INLINE Exponential exponential(vec x, float factor) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float turns = factor * 1.44269504f;
  vec shifted = x * turns + magic;
  vec n = shifted - magic;
  vec r = x * turns - n;
  vec p = r * 1.54035128e-4f + 1.33907355e-3f;
  p = p * r + 9.61823749e-3f;
  p = p * r + 5.55035743e-2f;
  p = p * r + 0.240226498f;
  p = p * r + 0.693147188f;
  return {(vec)(((ivec)shifted << 23) + 0x3F800000), p * r};
}

// Clamped where exp would leave the normal range.
INLINE vec sigmoid(vec x) {
  const Exponential e = exponential(clamped(x, 87.0f), -1.0f);
  return 1.0f / (1.0f + (e.scale * e.rest + e.scale));
}

// (exp(2x) - 1) / (exp(2x) + 1). Beyond the clamp it is 1 to the last digit.
INLINE vec hyperbolic(vec x) {
  const Exponential e = exponential(clamped(x, 10.0f), 2.0f);
  vec less = e.scale * e.rest + (e.scale - 1.0f);
  return less / (less + 2.0f);
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
