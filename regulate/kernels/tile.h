// Tiles of pixels of several channels, the products of narrow maps over them, and moments taken tile by tile.
#pragma once

#include "norm.h"

namespace {

constexpr int64_t NEAR = 32768;  // floats of x and h in a tile, at least: with all that it takes, half of 1 MB
// A block of a product that stays in registers: rows, and vectors of pixels.
constexpr int ROWS = LANES == 16 ? 8 : 4, STEP = 2;

struct Fusion {
  int64_t batch, read, write, pixels;    // N, R, M, H * W
  int64_t apart, images, width, row;     // of a tile: floats from image to image, images, floats, floats with a gap
  int64_t tiles, chunks;
  explicit Fusion(const int64_t* sizes) : batch(sizes[0]), read(sizes[1]), write(sizes[2]), pixels(sizes[3]) {
    apart = up(pixels, LANES);
    images = NEAR / both() / apart;
    images = images < 1 ? 1 : images < batch ? images : batch;
    width = up(images * apart, STEP * LANES);
    row = width + LANES;  // rows that lie a power of two apart would meet in few lines of the cache
    tiles = (batch + images - 1) / images;
    chunks = tiles < 8 ? tiles : 8;
  }
  int64_t both() const { return write + read; }
  static int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
};

// Some images, all their pixels: of a channel they lie in one row.
struct Tile {
  const Fusion& f;
  int64_t first, images;
  Tile(const Fusion& fusion, int64_t at) : f(fusion), first(at * fusion.images), images(fusion.batch - first) {
    if (images > f.images) images = f.images;
  }
  void in(const float* map, int64_t channels, float* rows) const {
    each(channels, [&](int64_t at, int64_t to) { copy(rows + to, map + at, f.pixels); });
  }
  void out(const float* rows, float* map, int64_t channels) const {
    each(channels, [&](int64_t at, int64_t from) { copy(map + at, rows + from, f.pixels); });
  }
  // All bits of the tile's pixels, none of what lies between and behind them.
  void mask(float* row) const {
    std::memset(row, 0, 4 * f.width);
    for (int64_t n = 0; n < images; ++n) std::memset(row + n * f.apart, 255, 4 * f.pixels);
  }
  template <class Visit>
  void each(int64_t channels, Visit visit) const {
    for (int64_t n = 0; n < images; ++n)
      for (int64_t c = 0; c < channels; ++c)
        visit(((first + n) * channels + c) * f.pixels, c * f.row + n * f.apart);
  }
};

INLINE float gathered(vec v) {
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// to (rows, width) = weights (rows, inner) * from (inner, width).
void product(const float* weights, const float* from, float* to, int64_t rows, int64_t inner, const Fusion& f) {
  for (int64_t i = 0; i < f.width; i += STEP * LANES)
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t last = rows - 1;
      const float* row[ROWS];
      for (int k = 0; k < ROWS; ++k) row[k] = weights + (r + k < last ? r + k : last) * inner;
      vec sum[ROWS][STEP] = {};
      for (int64_t j = 0; j < inner; ++j) {
        vec v[STEP];
        for (int s = 0; s < STEP; ++s) v[s] = load(from + j * f.row + i + s * LANES);
        for (int k = 0; k < ROWS; ++k)
          for (int s = 0; s < STEP; ++s) sum[k][s] += row[k][j] * v[s];
      }
      for (int k = 0; k < ROWS && r + k < rows; ++k)
        for (int s = 0; s < STEP; ++s) store(to + (r + k) * f.row + i + s * LANES, sum[k][s]);
    }
}

// sums (rows, columns), a vector each, += a (rows, width) * b (columns, width) transposed; the lanes stay apart.
void correlate(const float* a, const float* b, float* sums, int64_t rows, int64_t columns, const Fusion& f) {
  for (int64_t r = 0; r < rows; r += ROWS)
    for (int64_t c = 0; c < columns; c += STEP) {
      const float *left[ROWS], *right[STEP];
      for (int k = 0; k < ROWS; ++k) left[k] = a + (r + k < rows ? r + k : rows - 1) * f.row;
      for (int s = 0; s < STEP; ++s) right[s] = b + (c + s < columns ? c + s : columns - 1) * f.row;
      vec sum[ROWS][STEP] = {};
      for (int64_t i = 0; i < f.width; i += LANES) {
        vec v[STEP];
        for (int s = 0; s < STEP; ++s) v[s] = load(right[s] + i);
        for (int k = 0; k < ROWS; ++k)
          for (int s = 0; s < STEP; ++s) sum[k][s] += load(left[k] + i) * v[s];
      }
      for (int k = 0; k < ROWS && r + k < rows; ++k)
        for (int s = 0; s < STEP && c + s < columns; ++s) {
          float* to = sums + ((r + k) * columns + c + s) * LANES;
          store(to, load(to) + sum[k][s]);
        }
    }
}

// Mean and sum of squared deviations of each row, lane by lane, merged tile by tile.
struct Moments {
  std::unique_ptr<float[]> memory;  // per row two vectors
  vec seen = vec{};
  explicit Moments(int64_t rows) : memory(new (std::nothrow) float[2 * rows * LANES]) {}
  void begin(int64_t rows) { seen = vec{}, std::memset(memory.get(), 0, 8 * rows * LANES); }
  void add(const float* tile, const float* mask, int64_t rows, const Fusion& f) {
    vec count = vec{};
    for (int64_t i = 0; i < f.width; i += LANES) count += masked(broadcast(1.0f), mask + i);
    const vec least = count < 1.0f ? broadcast(1.0f) : count, all = seen + count;
    const vec share = count / (all < 1.0f ? broadcast(1.0f) : all);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = tile + r * f.row;
      vec sum = vec{}, square = vec{};
      for (int64_t i = 0; i < f.width; i += LANES) sum += masked(load(row + i), mask + i);
      const vec here = sum / least;
      for (int64_t i = 0; i < f.width; i += LANES) {
        vec d = masked(load(row + i) - here, mask + i);
        square += d * d;
      }
      float* own = memory.get() + 2 * r * LANES;
      const vec mean = load(own), apart = here - mean;
      store(own, mean + apart * share);
      store(own + LANES, load(own + LANES) + square + apart * apart * seen * share);
    }
    seen = all;
  }
  // Of all lanes together: mean, sum of squared deviations, and of how many.
  void end(int64_t r, double* found) const {
    const float* own = memory.get() + 2 * r * LANES;
    double mean = 0, deviation = 0, count = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      if ((int)seen[lane] == 0) continue;
      const double apart = own[lane] - mean, all = count + seen[lane];
      deviation += own[LANES + lane] + apart * apart * count * seen[lane] / all;
      mean += apart * seen[lane] / all;
      count = all;
    }
    found[0] = mean, found[1] = deviation, found[2] = count;
  }
};

}  // namespace
