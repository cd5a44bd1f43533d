// The fusion of one block in training: h = ReLU(norm(H)), y = W * [x, h], out = ReLU(norm(y)); maps are NCHW.
//
// For narrow maps, whose products are small against the maps. Work goes over tiles of one image or some: h is made and
// used while it is near the core, the moments of y are taken while it is written, and the backward never stores dy.
// Chunks of tiles have sums of their own, as in norm.h.

#include "tile.h"

namespace {

// What a thread works in, and nothing where there was no memory. Rows of x and of h, rows of y or its gradient.
struct Scratch {
  std::unique_ptr<float[]> memory;
  float *rows, *of_y, *more, *other, *mask, *sums;
  int64_t size;
  Scratch(const Fusion& f, bool backward) {
    const int64_t row = f.row, extra = backward ? f.both() * row + f.read * row + f.write * f.both() * LANES : 0;
    size = f.both() * row + f.write * row + row + extra;
    memory.reset(new (std::nothrow) float[size]());
    rows = memory.get();
    of_y = rows + f.both() * row;
    mask = of_y + f.write * row;
    more = mask + row;
    other = more + f.both() * row;
    sums = other + f.read * row;
  }
};

// The tiles of a chunk, one after the other. What lies between the pixels of a tile stays zero.
template <class Visit>
void tiles(const Fusion& f, int64_t chunk, Scratch& s, Visit visit) {
  int64_t images = -1;
  for (int64_t at = chunk * f.tiles / f.chunks; at < (chunk + 1) * f.tiles / f.chunks; ++at) {
    const Tile tile(f, at);
    if (tile.images != images) {
      std::memset(s.rows, 0, 4 * f.both() * f.row);
      tile.mask(s.mask);
      images = tile.images;
    }
    visit(tile);
  }
}

struct Layer {
  const float *weight, *bias, *stats;
};

INLINE Norm of(const Map& map, int64_t c, const Layer& layer) {
  return Norm(map, Job(map, c), layer.weight, layer.bias, layer.stats);
}

int64_t parts(int64_t batch, int64_t channels) {
  const int64_t wanted = (63 + channels) / channels;
  return wanted < batch ? wanted : batch;
}

Map map_of(const Fusion& f, int64_t channels) {
  const int64_t sizes[] = {f.batch, channels, f.pixels, 0};
  return Map(sizes, parts(f.batch, channels));
}

// Merges a channel's moments, (chunks, M, 3) from its first on, into its column of the stats.
void together(const double* found, const Fusion& f, double eps, float* stats) {
  double mean = 0, deviation = 0, count = 0;
  for (int64_t k = 0; k < f.chunks; ++k, found += 3 * f.write) {
    const double apart = found[0] - mean, all = count + found[2];
    deviation += found[1] + apart * apart * count * found[2] / all;
    mean += apart * found[2] / all;
    count = all;
  }
  stats[MEAN * f.write] = (float)mean;
  stats[INVERSE * f.write] = (float)(1 / std::sqrt(deviation / count + eps));
  stats[UNBIASED * f.write] = (float)(deviation / (count - 1));
}

// dy of a tile, from dout through the ReLU and the norm, as `gradient` has it.
void gradient_of_y(const Fusion& f, const Tile& tile, const Map& map, const Layer& layer, const float* y,
                   const float* dout, const float* dweight, const float* dbias, Scratch& s) {
  tile.in(y, f.write, s.of_y);
  tile.in(dout, f.write, s.more);
  for (int64_t c = 0; c < f.write; ++c) {
    const Norm norm = of(map, c, layer);
    const vec share = norm.scale * (float)(-1 / map.values());
    const vec constant = share * dbias[c], of_x = share * norm.inverse * dweight[c];
    for (int64_t i = 0; i < f.width; i += LANES) {
      float* at = s.of_y + c * f.row + i;
      const vec v = load(at), d = norm.passed(v, load(s.more + c * f.row + i));
      store(at, masked(norm.scale * d + of_x * (v - norm.mean) + constant, s.mask + i));
    }
  }
}

// Adds dh to the gradient of a tile's h and takes it through the ReLU; `sums` gets those that the norm of H needs.
void gradient_of_h(const Fusion& f, const Tile& tile, const float* stats, const float* hidden, const float* dh,
                   double* sums, Scratch& s) {
  float* to = s.more + f.write * f.row;
  const float* h = s.rows + f.write * f.row;
  if (dh) {
    tile.in(dh, f.read, s.other);
    for (int64_t i = 0; i < f.read * f.row; i += LANES) store(to + i, load(to + i) + load(s.other + i));
  }
  tile.in(hidden, f.read, s.other);
  for (int64_t c = 0; c < f.read; ++c) {
    const vec mean = broadcast(stats[MEAN * f.read + c]);
    vec sum = vec{}, product = vec{};
    for (int64_t i = 0; i < f.width; i += LANES) {
      const int64_t at = c * f.row + i;
      const vec d = masked(load(h + at) <= 0.0f ? vec{} : load(to + at), s.mask + i);
      store(to + at, d);
      sum += d;
      product += masked(d * (load(s.other + at) - mean), s.mask + i);
    }
    sums[2 * c] += gathered(sum);
    sums[2 * c + 1] += gathered(product);
  }
}

}  // namespace

// sizes: N, R, M, H * W. A layer's stats are (3, C), as in norm.cpp.
extern "C" int regulate_fuse(const int64_t* sizes, int64_t threads, const float* x, const float* hidden,
                             const float* weight_h, const float* bias_h, double eps_h, const float* mix,
                             const float* weight_y, const float* bias_y, double eps_y, float* h, float* y, float* out,
                             float* stats_h, float* stats_y) {
  const Fusion f(sizes);
  const Map map_h = map_of(f, f.read), map_y = map_of(f, f.write);
  const Sums sums_h(map_h);
  const std::unique_ptr<double[]> found(new (std::nothrow) double[3 * f.chunks * f.write]);
  if (!sums_h.memory || !found) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const Flush flush;
    Scratch s(f, false);
    Moments moments_y(f.write);
    const bool ready = s.memory && moments_y.memory;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < map_h.chunks * f.read; ++i) moments(map_h, Job(map_h, i), hidden, sums_h);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < f.read; ++c) merge(map_h, sums_h, c, eps_h, stats_h);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
      if (!ready) {
        failed = 1;
        continue;
      }
      moments_y.begin(f.write);
      tiles(f, chunk, s, [&](const Tile& tile) {
        float* own = s.rows + f.write * f.row;
        tile.in(x, f.write, s.rows);
        tile.in(hidden, f.read, own);
        for (int64_t r = 0; r < f.read; ++r) {
          const Norm norm = of(map_h, r, {weight_h, bias_h, stats_h});
          for (int64_t i = r * f.row; i < r * f.row + f.width; i += LANES) {
            const vec v = norm.scale * load(own + i) + norm.shift;
            store(own + i, masked(v < 0.0f ? vec{} : v, s.mask + i - r * f.row));
          }
        }
        tile.out(own, h, f.read);
        product(mix, s.rows, s.of_y, f.write, f.both(), f);
        moments_y.add(s.of_y, s.mask, f.write, f);
        tile.out(s.of_y, y, f.write);
      });
      for (int64_t c = 0; c < f.write; ++c) moments_y.end(c, found.get() + 3 * (chunk * f.write + c));
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < f.write; ++c) together(found.get() + 3 * c, f, eps_y, stats_y + c);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < map_y.chunks * f.write; ++i) {
      const Job job(map_y, i);
      const Norm norm(map_y, job, weight_y, bias_y, stats_y);
      scale_relu(map_y, job, y, norm.scale, norm.shift, out);
    }
  }
  return failed;
}

// Kept from the forward: x, hidden, h, y and the stats. dh may be null. `hidden_grad` serves as a buffer meanwhile.
extern "C" int regulate_fuse_backward(const int64_t* sizes, int64_t threads, const float* x, const float* hidden,
                                      const float* h, const float* y, const float* weight_h, const float* bias_h,
                                      const float* stats_h, const float* mix, const float* weight_y,
                                      const float* bias_y, const float* stats_y, const float* dout, const float* dh,
                                      float* dx, float* hidden_grad, float* dweight_h, float* dbias_h, float* dmix,
                                      float* dweight_y, float* dbias_y) {
  const Fusion f(sizes);
  const Map map_h = map_of(f, f.read), map_y = map_of(f, f.write);
  const Sums sums_y(map_y);
  const int64_t both = f.both(), values = f.write * both;
  const std::unique_ptr<float[]> turned(new (std::nothrow) float[values]);
  const std::unique_ptr<float[]> shares(new (std::nothrow) float[f.chunks * values]);
  const std::unique_ptr<double[]> sums(new (std::nothrow) double[2 * f.chunks * f.read]());
  if (!sums_y.memory || !turned || !shares || !sums) return 1;
  for (int64_t m = 0; m < f.write; ++m)
    for (int64_t k = 0; k < both; ++k) turned[k * f.write + m] = mix[m * both + k];
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const Flush flush;
    Scratch s(f, true);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < map_y.chunks * f.write; ++i) {
      const Job job(map_y, i);
      gradient_sums(map_y, job, y, dout, Norm(map_y, job, weight_y, bias_y, stats_y), sums_y);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < f.write; ++c) {
      double sum = 0, product = 0;
      for (int64_t k = 0; k < map_y.chunks; ++k) sum += sums_y.row(0, k)[c], product += sums_y.row(1, k)[c];
      dbias_y[c] = (float)sum;
      dweight_y[c] = (float)(product * stats_y[INVERSE * f.write + c]);
    }
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
      if (!s.memory) {
        failed = 1;
        continue;
      }
      std::memset(s.sums, 0, 4 * values * LANES);
      double* own = sums.get() + 2 * chunk * f.read;
      tiles(f, chunk, s, [&](const Tile& tile) {
        gradient_of_y(f, tile, map_y, {weight_y, bias_y, stats_y}, y, dout, dweight_y, dbias_y, s);
        tile.in(x, f.write, s.rows);
        tile.in(h, f.read, s.rows + f.write * f.row);
        correlate(s.of_y, s.rows, s.sums, f.write, both, f);
        product(turned.get(), s.of_y, s.more, both, f.write, f);
        tile.out(s.more, dx, f.write);
        gradient_of_h(f, tile, stats_h, hidden, dh, own, s);
        tile.out(s.more + f.write * f.row, hidden_grad, f.read);
      });
      for (int64_t i = 0; i < values; ++i) shares[chunk * values + i] = gathered(load(s.sums + i * LANES));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < values; ++i) {
      dmix[i] = 0;
      for (int64_t chunk = 0; chunk < f.chunks; ++chunk) dmix[i] += shares[chunk * values + i];
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < f.read; ++c) {
      double sum = 0, product = 0;
      for (int64_t k = 0; k < f.chunks; ++k) {
        const double* own = sums.get() + 2 * (k * f.read + c);
        sum += own[0], product += own[1];
      }
      dbias_h[c] = (float)sum;
      dweight_h[c] = (float)(product * stats_h[INVERSE * f.read + c]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < map_h.chunks * f.read; ++i) {
      const Job job(map_h, i);
      const Norm norm(map_h, job, weight_h, bias_h, stats_h);
      gradient(map_h, job, hidden, hidden_grad, norm, dweight_h, dbias_h, hidden_grad);
    }
  }
  return failed;
}
