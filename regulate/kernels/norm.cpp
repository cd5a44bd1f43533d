// Batch normalisation and ReLU in one: y = max(0, x * scale + shift) with a scale and a shift per channel.
//
// torch reads and writes the map once for each; here it is read once for the moments and once for the result.
// Tasks are (chunk of the batch, block of channels), each with sums of its own, as in light.cpp.

#include "vec.h"

#include <cmath>

namespace {

struct Map {
  int64_t batch, channels, pixels;
  bool last;  // channels last
};

// A run of one channel (NCHW) or a tile of 16 channels (channels last), short enough for the nearest cache.
constexpr int64_t RUN = 4096, TILE = 256;

// Calls visit(first channel, width, offset, pixels, lanes' step) for each run of a task.
template <class Visit>
INLINE void runs(const Map& map, int64_t chunks, int64_t job, Visit visit) {
  const int64_t blocks = map.last ? (map.channels + LANES - 1) / LANES : map.channels;
  const int64_t chunk = job / blocks, first = job % blocks * (map.last ? LANES : 1);
  const int64_t wide = !map.last ? 1 : map.channels - first < LANES ? map.channels - first : LANES;
  const int64_t size = map.last ? TILE : RUN;
  for (int64_t n = chunk * map.batch / chunks; n < (chunk + 1) * map.batch / chunks; ++n)
    for (int64_t p = 0; p < map.pixels; p += size) {
      const int64_t count = map.pixels - p < size ? map.pixels - p : size;
      const int64_t offset = map.last ? (n * map.pixels + p) * map.channels + first
                                      : (n * map.channels + first) * map.pixels + p;
      visit(first, wide, offset, count);
    }
}

INLINE int64_t jobs(const Map& map, int64_t chunks) {
  return chunks * (map.last ? (map.channels + LANES - 1) / LANES : map.channels);
}

// The vectors of a run: whole ones, then the rest with zeros behind. body(offset, vector width).
template <class Body>
INLINE void vectors(const Map& map, int64_t wide, int64_t offset, int64_t count, Body body) {
  if (map.last) {
    for (int64_t i = 0; i < count; ++i) body(offset + i * map.channels, wide);
  } else {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(offset + i, (int64_t)LANES);
    if (i < count) body(offset + i, count - i);
  }
}

INLINE vec part(const float* p, int64_t wide) {
  if (wide == LANES) return load(p);
  vec v = vec{};
  for (int64_t lane = 0; lane < wide; ++lane) v[lane] = p[lane];
  return v;
}

INLINE void put(float* p, vec v, int64_t wide) {
  if (wide == LANES) store(p, v);
  else for (int64_t lane = 0; lane < wide; ++lane) p[lane] = v[lane];
}

INLINE vec channel(const float* values, int64_t first, int64_t wide, bool last) {
  return last ? part(values + first, wide) : broadcast(values[first]);
}

// Adds the lanes (NCHW) or keeps them apart (channels last), in double: runs are short, maps are not.
INLINE void add(double* sums, vec v, int64_t wide, bool last) {
  if (!last) sums[0] += total(v);
  else for (int64_t lane = 0; lane < wide; ++lane) sums[lane] += v[lane];
}

}  // namespace

// sizes: N, C, H * W and whether the maps are channels last, for all three functions.

// Mean and sum of squared deviations per chunk and channel, merged run by run (Chan et al. 1979).
extern "C" void regulate_moments(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x, double* means,
                                 double* deviations) {
  const Map map = {sizes[0], sizes[1], sizes[2], sizes[3] != 0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs(map, chunks); ++job) {
    const Flush flush;
    double mean[LANES] = {}, deviation[LANES] = {}, seen = 0;
    int64_t start = 0, width = 0;
    runs(map, chunks, job, [&](int64_t first, int64_t wide, int64_t offset, int64_t count) {
      double sum[LANES] = {}, square[LANES] = {};
      vec s = vec{}, q = vec{};
      vectors(map, wide, offset, count, [&](int64_t at, int64_t w) { s += part(x + at, w); });
      add(sum, s, wide, map.last);
      vec here = vec{};
      for (int lane = 0; lane < LANES; ++lane) here[lane] = (float)(sum[map.last ? lane : 0] / (double)count);
      vectors(map, wide, offset, count, [&](int64_t at, int64_t w) {
        vec d = part(x + at, w) - here;
        if (w < LANES && !map.last)
          for (int64_t lane = w; lane < LANES; ++lane) d[lane] = 0;
        q += d * d;
      });
      add(square, q, wide, map.last);
      for (int64_t lane = 0; lane < wide; ++lane) {
        // `here` is the rounded mean: what it is off, the sum of squares has too much.
        const double exact = sum[lane] / (double)count, off = exact - here[lane], apart = exact - mean[lane];
        deviation[lane] += square[lane] - count * off * off + apart * apart * seen * count / (seen + count);
        mean[lane] += apart * count / (seen + count);
      }
      seen += count;
      start = first;
      width = wide;
    });
    const int64_t row = job / (jobs(map, chunks) / chunks) * map.channels + start;
    for (int64_t lane = 0; lane < width; ++lane) means[row + lane] = mean[lane], deviations[row + lane] = deviation[lane];
  }
}

extern "C" void regulate_scale_relu(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x,
                                    const float* scale, const float* shift, float* y) {
  const Map map = {sizes[0], sizes[1], sizes[2], sizes[3] != 0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs(map, chunks); ++job) {
    const Flush flush;
    runs(map, chunks, job, [&](int64_t first, int64_t wide, int64_t offset, int64_t count) {
      const vec a = channel(scale, first, wide, map.last), b = channel(shift, first, wide, map.last);
      vectors(map, wide, offset, count, [&](int64_t at, int64_t w) {
        vec v = a * part(x + at, w) + b;
        put(y + at, v < 0.0f ? vec{} : v, w);
      });
    });
  }
}

// The sums over d = dy where y > 0, of d and of d * (x - mean), per chunk and channel.
extern "C" void regulate_norm_sums(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x, const float* y,
                                   const float* dy, const float* mean, double* sum, double* product) {
  const Map map = {sizes[0], sizes[1], sizes[2], sizes[3] != 0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs(map, chunks); ++job) {
    const Flush flush;
    double of_d[LANES] = {}, of_dx[LANES] = {};
    int64_t start = 0, width = 0;
    runs(map, chunks, job, [&](int64_t first, int64_t wide, int64_t offset, int64_t count) {
      const vec m = channel(mean, first, wide, map.last);
      vec s = vec{}, p = vec{};
      vectors(map, wide, offset, count, [&](int64_t at, int64_t w) {
        vec d = part(y + at, w) <= 0.0f ? vec{} : part(dy + at, w);
        s += d;
        p += d * (part(x + at, w) - m);
      });
      add(of_d, s, wide, map.last);
      add(of_dx, p, wide, map.last);
      start = first;
      width = wide;
    });
    const int64_t row = job / (jobs(map, chunks) / chunks) * map.channels + start;
    for (int64_t lane = 0; lane < width; ++lane) sum[row + lane] = of_d[lane], product[row + lane] = of_dx[lane];
  }
}

// dx = a * d + b * (x - mean) + c, with a, b and c per channel.
extern "C" void regulate_norm_input(const int64_t* sizes, int64_t chunks, int64_t threads, const float* x, const float* y,
                                    const float* dy, const float* mean, const float* a, const float* b, const float* c,
                                    float* dx) {
  const Map map = {sizes[0], sizes[1], sizes[2], sizes[3] != 0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs(map, chunks); ++job) {
    const Flush flush;
    runs(map, chunks, job, [&](int64_t first, int64_t wide, int64_t offset, int64_t count) {
      const vec of_d = channel(a, first, wide, map.last), of_x = channel(b, first, wide, map.last);
      const vec constant = channel(c, first, wide, map.last), m = channel(mean, first, wide, map.last);
      vectors(map, wide, offset, count, [&](int64_t at, int64_t w) {
        vec d = part(y + at, w) <= 0.0f ? vec{} : part(dy + at, w);
        put(dx + at, of_d * d + of_x * (part(x + at, w) - m) + constant, w);
      });
    });
  }
}
