// Batch normalisation and ReLU in one: y = max(0, x * scale + shift) with a scale and a shift per channel.

#include "norm.h"

// sizes: N, C, H * W and whether the maps are channels last, for all three functions.

extern "C" int regulate_scale_relu(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x,
                                    const float* scale, const float* shift, float* y) {
  const Map map(sizes, chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < chunks * map.blocks(); ++i) {
    const Flush flush;
    const Job job(map, i);
    scale_relu(map, job, x, channel(map, job, scale), channel(map, job, shift), y);
  }
  return 0;
}

// With the batch's own moments, which go to `stats`, (3, C).
extern "C" int regulate_norm_relu(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x,
                                   const float* weight, const float* bias, double eps, float* stats, float* y) {
  const Map map(sizes, chunks);
  const Sums sums(map);
  if (!sums.memory) return 1;
#pragma omp parallel num_threads(threads)
  {
    const Flush flush;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks * map.blocks(); ++i) moments(map, Job(map, i), x, sums);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < map.channels; ++c) merge(map, sums, c, eps, stats);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks * map.blocks(); ++i) {
      const Job job(map, i);
      const Norm norm(map, job, weight, bias, stats);
      scale_relu(map, job, x, norm.scale, norm.shift, y);
    }
  }
  return 0;
}

extern "C" int regulate_norm_relu_backward(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x,
                                            const float* dy, const float* weight, const float* bias, const float* stats,
                                            float* dx, float* dweight, float* dbias) {
  const Map map(sizes, chunks);
  const Sums sums(map);
  if (!sums.memory) return 1;
#pragma omp parallel num_threads(threads)
  {
    const Flush flush;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks * map.blocks(); ++i) {
      const Job job(map, i);
      gradient_sums(map, job, x, dy, Norm(map, job, weight, bias, stats), sums);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < map.channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t k = 0; k < chunks; ++k) sum += sums.row(0, k)[c], product += sums.row(1, k)[c];
      dbias[c] = (float)sum;
      dweight[c] = (float)(product * stats[INVERSE * map.channels + c]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks * map.blocks(); ++i) {
      const Job job(map, i);
      gradient(map, job, x, dy, Norm(map, job, weight, bias, stats), dweight, dbias, dx);
    }
  }
  return 0;
}
