// Vectors of floats and the two activations. NaN and infinity come out as they would elsewhere: no -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#ifdef __SSE__
#include <immintrin.h>
#endif

namespace {

// As wide as the registers that this is compiled for. A wider vector would be right as well, but compilers break its
// comparisons and selections into single floats. REGISTERS: how many there are for them.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
constexpr char INSTRUCTION_SET[] = "AVX-512";
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
constexpr char INSTRUCTION_SET[] = "AVX2";
#elif defined(__SSE2__)
constexpr int LANES = 4, REGISTERS = 16;
constexpr char INSTRUCTION_SET[] = "SSE2";
#elif defined(__ARM_NEON)
constexpr int LANES = 4, REGISTERS = 32;
constexpr char INSTRUCTION_SET[] = "NEON";
#else
constexpr int LANES = 4, REGISTERS = 16;
constexpr char INSTRUCTION_SET[] = "generic";
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float quarter __attribute__((vector_size(16), aligned(4), may_alias));

#define MEMBER inline __attribute__((always_inline))
#define INLINE static MEMBER

INLINE vec load(const float* p) { return *(const loose*)p; }
INLINE void store(float* p, vec v) { *(loose*)p = v; }
INLINE vec broadcast(float v) { return vec{} + v; }

// The first `wide` lanes from values that lie `apart`, zeros in the others.
INLINE vec part(const float* p, int64_t wide, int64_t apart = 1) {
  if (apart == 1 && wide == LANES) return load(p);
  vec v = vec{};
  for (int64_t lane = 0; lane < wide; ++lane) v[lane] = p[lane * apart];
  return v;
}

// v in a register, for several uses: compilers would rather read it again as an operand of each, and reading is dear.
INLINE vec kept(vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// v where the mask's bits are set, else zero, NaN and infinity included: a product with zero would keep them.
INLINE vec masked(vec v, vec mask) { return (vec)((ivec)v & (ivec)mask); }

// All bits in the first `count` lanes, none in the others.
INLINE vec first_lanes(int64_t count) {
  ivec lanes = ivec{};
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  return (vec)(lanes < (int32_t)count);
}

INLINE float total(vec v) {
  float sums[LANES];
  store(sums, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
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

// 2^x = 2^n 2^r: the nearest integer, where the exponent of a float has it, and what is left, |r| <= 1/2.
struct Power {
  ivec n;
  vec r;
};

INLINE Power power(vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  vec shifted = x + magic;
  return {(ivec)shifted << 23, x - (shifted - magic)};
}

// The activations take x times FACTOR, which costs nothing where the taps that x is the sum of have it in them. Their
// polynomials are those whose largest relative error is least (Remez, in double).
constexpr float LOG2E = 1.44269504f;

// 1 / (1 + exp(-x)). Clamped where the power would leave the normal range; 2^r to 1e-7.
struct Sigmoid {
  static constexpr float FACTOR = -LOG2E;
  static MEMBER vec of(vec x) {
    const Power e = power(clamped(x, 126.0f));
    vec p = e.r * 0.00132647296f + 0.00967151299f;
    p = p * e.r + 0.0555073358f;
    p = p * e.r + 0.240222424f;
    p = p * e.r + 0.693147004f;
    p = p * e.r + 1.0f;
    return 1.0f / (1.0f + p * (vec)(e.n + 0x3F800000));  // not added to p's bits: a NaN must stay one
  }
};

// (exp(2x) - 1) / (exp(2x) + 1). Beyond the clamp it is 1 to the last digit. 2^r - 1 by itself, to 2e-8 of it: where x is
// small, a difference from 1 would lose its digits.
struct Hyperbolic {
  static constexpr float FACTOR = 2 * LOG2E;
  static MEMBER vec of(vec x) {
    const Power e = power(clamped(x, 30.0f));
    const vec scale = (vec)(e.n + 0x3F800000);
    vec p = e.r * 1.54035128e-4f + 1.33907355e-3f;
    p = p * e.r + 9.61823749e-3f;
    p = p * e.r + 5.55035743e-2f;
    p = p * e.r + 0.240226498f;
    p = p * e.r + 0.693147188f;
    const vec less = p * e.r * scale + (scale - 1.0f);
    return less / (less + 2.0f);
  }
};

INLINE vec hyperbolic(vec x) { return Hyperbolic::of(x * Hyperbolic::FACTOR); }

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
