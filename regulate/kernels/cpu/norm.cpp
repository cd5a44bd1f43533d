// Batch normalisation and ReLU in one: y = max(0, x * scale + shift) with a scale and a shift per channel. Where the
// map before the fusion is given, what a ReLU would cut from it is added: min(0, unfused).
//
// torch reads and writes the map once for each; here it is read once for the moments and once for the result, and
// the backward sees from x where the ReLU let pass. Tasks are (chunk of the batch, block of channels), each with
// sums of its own, as in light.cpp.

#include "tasks.h"

#include <cmath>

namespace {

// A part of a task that fits the nearest cache: rows of pixels of one channel, or pixels of a vector of channels.
struct Piece {
  int64_t offset, rows, count;
};

constexpr int64_t RUN = 4096, TILE = 256;

template <class Visit>
INLINE void pieces(const Shape& map, const Task& task, Visit visit) {
  const int64_t begin = map.start(task.chunk), end = map.start(task.chunk + 1), pixels = map.pixels();
  if (map.last) {
    for (int64_t p = begin * pixels; p < end * pixels; p += TILE) {
      const int64_t left = end * pixels - p;
      visit(Piece{p * map.channels + task.first, 1, left < TILE ? left : TILE});
    }
    return;
  }
  const int64_t together = pixels < RUN ? RUN / pixels : 1;  // images, where they are small
  for (int64_t n = begin; n < end; n += together)
    for (int64_t p = 0; p < pixels; p += RUN) {
      const int64_t rows = end - n < together ? end - n : together, left = pixels - p;
      visit(Piece{(n * map.channels + task.first) * pixels + p, rows, left < RUN ? left : RUN});
    }
}

// The vectors of a piece; the last of a row may be narrower. body(offset, how many of its lanes count).
template <class Body>
INLINE void vectors(const Shape& map, const Task& task, const Piece& piece, Body body) {
  if (map.last) {
    for (int64_t i = 0; i < piece.count; ++i) body(piece.offset + i * map.channels, task.wide);
    return;
  }
  for (int64_t row = 0; row < piece.rows; ++row) {
    const int64_t at = piece.offset + row * map.channels * map.pixels();
    int64_t i = 0;
    for (; i + LANES <= piece.count; i += LANES) body(at + i, (int64_t)LANES);
    if (i < piece.count) body(at + i, piece.count - i);
  }
}

INLINE void put(float* p, vec v, int64_t wide) {
  if (wide == LANES) store(p, v);
  else for (int64_t lane = 0; lane < wide; ++lane) p[lane] = v[lane];
}

// Adds the lanes (NCHW) or keeps them apart (channels last), in double: pieces are short, maps are not.
INLINE void add(const Shape& map, const Task& task, double* sums, vec v) {
  if (!map.last) sums[0] += total(v);
  else for (int64_t lane = 0; lane < task.wide; ++lane) sums[lane] += v[lane];
}

// Two sums per chunk and channel; no memory if there was none to be had.
struct Sums {
  std::unique_ptr<double[]> memory;
  int64_t chunks, channels;
  explicit Sums(const Shape& map)
      : memory(new (std::nothrow) double[2 * map.chunks * map.channels]), chunks(map.chunks), channels(map.channels) {}
  double* row(int which, int64_t chunk) const { return memory.get() + (which * chunks + chunk) * channels; }
};

// Mean and sum of squared deviations, merged piece by piece (Chan et al. 1979).
void moments(const Shape& map, const Task& task, const float* x, const Sums& sums) {
  double mean[LANES] = {}, deviation[LANES] = {}, seen = 0;
  pieces(map, task, [&](const Piece& piece) {
    const double count = (double)piece.rows * piece.count;
    double sum[LANES] = {}, square[LANES] = {};
    vec s = vec{}, q = vec{};
    vectors(map, task, piece, [&](int64_t at, int64_t wide) { s += part(x + at, wide); });
    add(map, task, sum, s);
    vec here = vec{};
    for (int lane = 0; lane < LANES; ++lane) here[lane] = (float)(sum[map.last ? lane : 0] / count);
    vectors(map, task, piece, [&](int64_t at, int64_t wide) {
      vec d = part(x + at, wide) - here;
      if (!map.last)
        for (int64_t lane = wide; lane < LANES; ++lane) d[lane] = 0;
      q += d * d;
    });
    add(map, task, square, q);
    for (int64_t lane = 0; lane < task.wide; ++lane) {
      // `here` is the rounded mean: what it is off, the sum of squares has too much.
      const double exact = sum[lane] / count, off = exact - here[lane], apart = exact - mean[lane];
      deviation[lane] += square[lane] - count * off * off + apart * apart * seen * count / (seen + count);
      mean[lane] += apart * count / (seen + count);
    }
    seen += count;
  });
  std::copy_n(mean, task.wide, sums.row(0, task.chunk) + task.first);
  std::copy_n(deviation, task.wide, sums.row(1, task.chunk) + task.first);
}

// What the rows of `stats` hold, C values each.
enum { MEAN, INVERSE, UNBIASED };

// Mean, 1 / sqrt(variance + eps) and unbiased variance of a channel, from those of the chunks.
void merge(const Shape& map, const Sums& sums, int64_t c, double eps, float* stats) {
  double mean = 0, deviation = 0;
  for (int64_t k = 0; k < map.chunks; ++k) mean += sums.row(0, k)[c] * (map.start(k + 1) - map.start(k)) / map.batch;
  for (int64_t k = 0; k < map.chunks; ++k) {
    const double off = sums.row(0, k)[c] - mean;
    deviation += sums.row(1, k)[c] + off * off * (map.start(k + 1) - map.start(k)) * map.pixels();
  }
  stats[MEAN * map.channels + c] = (float)mean;
  stats[INVERSE * map.channels + c] = (float)(1 / std::sqrt(deviation / map.values() + eps));
  stats[UNBIASED * map.channels + c] = (float)(deviation / (map.values() - 1));
}

// Returns whether anything of `unfused` is below zero; it may be null.
bool scale_relu(const Shape& map, const Task& task, const float* x, vec scale, vec shift, const float* unfused, float* y) {
  ivec below = ivec{};
  pieces(map, task, [&](const Piece& piece) {
    vectors(map, task, piece, [&](int64_t at, int64_t wide) {
      vec v = scale * part(x + at, wide) + shift;
      v = v < 0.0f ? vec{} : v;
      if (unfused) {
        const vec u = part(unfused + at, wide);
        const ivec negative = u < 0.0f;
        below |= negative;
        v += masked(u, (vec)negative);
      }
      put(y + at, v, wide);
    });
  });
  int32_t any = 0;
  for (int lane = 0; lane < LANES; ++lane) any |= below[lane];
  return any;
}

// What the passes of the backward need of a channel.
struct Norm {
  vec mean, inverse, scale, shift;
  Norm(const Shape& map, const Task& task, const float* weight, const float* bias, const float* stats)
      : mean(take(stats + MEAN * map.channels, 1, map, task)),
        inverse(take(stats + INVERSE * map.channels, 1, map, task)),
        scale(take(weight, 1, map, task) * inverse),
        shift(take(bias, 1, map, task) - mean * scale) {}
  vec passed(vec x, vec dy) const { return scale * x + shift <= 0.0f ? vec{} : dy; }
};

// The sums of d, which is dy where the ReLU let pass, and of d * (x - mean).
void gradient_sums(const Shape& map, const Task& task, const float* x, const float* dy, const Norm& norm,
                   const Sums& sums) {
  double of_d[LANES] = {}, of_dx[LANES] = {};
  pieces(map, task, [&](const Piece& piece) {
    vec s = vec{}, p = vec{};
    vectors(map, task, piece, [&](int64_t at, int64_t wide) {
      vec v = part(x + at, wide), d = norm.passed(v, part(dy + at, wide));
      s += d;
      p += d * (v - norm.mean);
    });
    add(map, task, of_d, s);
    add(map, task, of_dx, p);
  });
  std::copy_n(of_d, task.wide, sums.row(0, task.chunk) + task.first);
  std::copy_n(of_dx, task.wide, sums.row(1, task.chunk) + task.first);
}

// dx = scale * (d - mean of d - normalised x * mean of (d * normalised x)).
void gradient(const Shape& map, const Task& task, const float* x, const float* dy, const Norm& norm, const float* dweight,
              const float* dbias, float* dx) {
  const vec share = norm.scale * (float)(-1 / map.values());
  const vec constant = share * take(dbias, 1, map, task), of_x = share * norm.inverse * take(dweight, 1, map, task);
  pieces(map, task, [&](const Piece& piece) {
    vectors(map, task, piece, [&](int64_t at, int64_t wide) {
      vec v = part(x + at, wide), d = norm.passed(v, part(dy + at, wide));
      put(dx + at, norm.scale * d + of_x * (v - norm.mean) + constant, wide);
    });
  });
}

}  // namespace

// sizes and chunks: see Shape, for both functions.

// With the batch's own moments, which go to `stats`, (3, C). `below` becomes 1 if anything of `unfused` is below zero.
extern "C" int regulate_norm_relu(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x,
                                   const float* weight, const float* bias, double eps, const float* unfused, float* stats,
                                   float* below, float* y) {
  const Shape map(sizes, chunks);
  const Sums sums(map);
  if (!sums.memory) return 1;
  int any = 0;
#pragma omp parallel num_threads(threads) reduction(| : any)
  {
    const Flush flush;
    tasks(map, [&](const Task& task) { moments(map, task, x, sums); });
#pragma omp for schedule(static)
    for (int64_t c = 0; c < map.channels; ++c) merge(map, sums, c, eps, stats);
    tasks(map, [&](const Task& task) {
      const Norm norm(map, task, weight, bias, stats);
      any |= scale_relu(map, task, x, norm.scale, norm.shift, unfused, y);
    });
  }
  *below = (float)any;
  return 0;
}

extern "C" int regulate_norm_relu_backward(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x,
                                            const float* dy, const float* weight, const float* bias, const float* stats,
                                            float* dx, float* dweight, float* dbias) {
  const Shape map(sizes, chunks);
  const Sums sums(map);
  if (!sums.memory) return 1;
#pragma omp parallel num_threads(threads)
  {
    const Flush flush;
    tasks(map, [&](const Task& task) {
      gradient_sums(map, task, x, dy, Norm(map, task, weight, bias, stats), sums);
    });
#pragma omp for schedule(static)
    for (int64_t c = 0; c < map.channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t k = 0; k < chunks; ++k) sum += sums.row(0, k)[c], product += sums.row(1, k)[c];
      dbias[c] = (float)sum;
      dweight[c] = (float)(product * stats[INVERSE * map.channels + c]);
    }
    tasks(map, [&](const Task& task) {
      gradient(map, task, x, dy, Norm(map, task, weight, bias, stats), dweight, dbias, dx);
    });
  }
  return 0;
}
