// What a processor can do at most: multiply-adds of vectors, and bytes moved. bench_limits.py compiles and calls it.

#include "vec.h"

// Rounds of multiply-adds, in chains that wait for nothing but themselves; 10 of them keep two units of four cycles busy.
extern "C" float limits_multiply_adds(int64_t threads, int64_t rounds, float factor, float summand) {
  float out = 0;
#pragma omp parallel num_threads(threads) reduction(+ : out)
  {
    const vec a = broadcast(factor), b = broadcast(summand);
    // Not alike, or the compiler would compute one for all.
    vec s0 = b, s1 = s0 + b, s2 = s1 + b, s3 = s2 + b, s4 = s3 + b, s5 = s4 + b, s6 = s5 + b, s7 = s6 + b, s8 = s7 + b;
    vec s9 = s8 + b;
    for (int64_t i = 0; i < rounds; ++i) {
      s0 = s0 * a + b, s1 = s1 * a + b, s2 = s2 * a + b, s3 = s3 * a + b, s4 = s4 * a + b;
      s5 = s5 * a + b, s6 = s6 * a + b, s7 = s7 * a + b, s8 = s8 * a + b, s9 = s9 * a + b;
    }
    out += total(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9);
  }
  return out;
}

extern "C" int64_t limits_per_round() { return 10 * LANES; }

// a = b + factor c, the triad of STREAM, over arrays that the threads share.
extern "C" void limits_triad(int64_t threads, int64_t rounds, int64_t count, float factor, float* a, const float* b,
                             const float* c) {
#pragma omp parallel num_threads(threads)
  for (int64_t r = 0; r < rounds; ++r) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count / LANES; ++i)
      store(a + i * LANES, load(b + i * LANES) + factor * load(c + i * LANES));
  }
}
