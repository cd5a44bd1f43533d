// One step of a light cell on the CPU, forward and backward, one channel plane after the other.
//
// Group i of the mix sees X_i and H_i alone and the 3x3 is depthwise, so a step never leaves its plane: load X,
// H and C into a padded scratch that stays in the cache, do everything there, store H and C. The backward
// computes the gates again, which costs less than keeping them.
//
// A scratch plane is flat. A row holds W pixels behind one pixel of zeros, which is the right border of the row
// above as well, so each of the nine taps is one constant offset and a plane of any size is one loop. Small planes
// of a channel are stacked, a row of zeros between them, so that loops stay long. A pixel is one float (NCHW: a vector covers 16 pixels of a channel) or 16 (channels last: a vector covers 16 channels of a
// pixel); only loading and storing know the difference.

#include "vec.h"

namespace {

enum Cell { RNN = 0, GRU = 1, LSTM = 2 };
constexpr int GATES[] = {1, 3, 4};
constexpr int64_t LONG = 1024;  // floats in a stack of small planes: sixteen buffers stay near the core

struct Shape {
  int64_t batch, channels, height, width;
  bool last;  // channels last
};

struct Plane {
  int64_t row, image, stack, begin, end, size, taps[9];
  int lanes;
  Plane(const Shape& s, int64_t images) : lanes(s.last ? LANES : 1) {
    row = (s.width + 1) * lanes;
    image = (s.height + 1) * row;
    const int64_t stacks = (images * image + LONG - 1) / LONG;  // as many as it takes, and then evenly filled
    stack = image < LONG && stacks > 0 ? (images + stacks - 1) / stacks : 1;
    begin = row + lanes;
    end = begin + stack * image - row - lanes;
    size = stack * image + row + lanes + LANES;
    for (int t = 0; t < 9; ++t) taps[t] = (t / 3 - 1) * row + (t % 3 - 1) * lanes;
  }
};

// Where a task's channels lie in a map and how they get into and out of the scratch.
struct Window {
  const Shape& shape;
  const Plane& plane;
  int64_t offset, wide;
  Window(const Shape& s, const Plane& p, int64_t n, int64_t block) : shape(s), plane(p) {
    int64_t first = block * p.lanes, pixels = s.height * s.width;
    wide = s.channels - first < p.lanes ? s.channels - first : p.lanes;
    offset = s.last ? n * pixels * s.channels + first : (n * s.channels + first) * pixels;
  }
  void in(const float* map, float* scratch, int64_t place) const {
    for (int64_t y = 0; y < shape.height; ++y) {
      float* to = scratch + plane.begin + place * plane.image + y * plane.row;
      if (!map) {
        std::memset(to, 0, 4 * shape.width * plane.lanes);
      } else if (!shape.last) {
        copy(to, map + offset + y * shape.width, shape.width);
      } else {
        const float* from = map + offset + y * shape.width * shape.channels;
        for (int64_t x = 0; x < shape.width; ++x, from += shape.channels, to += LANES) {
          if (wide == LANES) store(to, load(from));
          else for (int lane = 0; lane < LANES; ++lane) to[lane] = lane < wide ? from[lane] : 0.0f;
        }
      }
    }
  }
  void out(const float* scratch, float* map, int64_t place) const {
    if (!map) return;
    for (int64_t y = 0; y < shape.height; ++y) {
      const float* from = scratch + plane.begin + place * plane.image + y * plane.row;
      if (!shape.last) {
        copy(map + offset + y * shape.width, from, shape.width);
        continue;
      }
      float* to = map + offset + y * shape.width * shape.channels;
      for (int64_t x = 0; x < shape.width; ++x, to += shape.channels, from += LANES) {
        if (wide == LANES) store(to, load(from));
        else copy(to, from, wide);
      }
    }
  }
};

// The parameters of one gate for the channels of a task, or their gradients: mix, 3x3 and bias.
struct Gate {
  vec x, h, tap[9], bias;
};

struct Weights {
  float *mix, *weight, *bias;
};

// The values of one parameter: `values` apart per channel, the same for all lanes or one per lane.
INLINE vec take(const float* values, int64_t channel, int64_t apart, int64_t wide, bool last) {
  if (!last) return broadcast(values[channel * apart]);
  vec v = vec{};
  for (int64_t lane = 0; lane < wide; ++lane) v[lane] = values[(channel + lane) * apart];
  return v;
}

INLINE void give(float* values, vec v, int64_t channel, int64_t apart, int64_t wide, bool last) {
  if (!last) { values[channel * apart] = total(v); return; }
  for (int64_t lane = 0; lane < wide; ++lane) values[(channel + lane) * apart] = v[lane];
}

template <class Visit>
INLINE void parameters(Gate& gate, const Weights& w, Visit visit) {
  visit(gate.x, w.mix, 2);
  visit(gate.h, w.mix + 1, 2);
  for (int t = 0; t < 9; ++t) visit(gate.tap[t], w.weight + t, 9);
  visit(gate.bias, w.bias, 1);
}

void mix(const float* x, const float* h, float* m, const Gate& gate, const Plane& p) {
  for (int64_t i = p.begin; i < p.end; i += LANES) store(m + i, gate.x * load(x + i) + gate.h * load(h + i));
}

INLINE vec convolve(const float* m, const Gate& gate, const Plane& p, int64_t i) {
  vec sum = gate.bias;
  for (int t = 0; t < 9; ++t) sum += gate.tap[t] * load(m + i + p.taps[t]);
  return sum;
}

// From dg, the gradient of a gate before its activation, to those of its parameters, of x and of h (or of r.h).
// dg is zero on the border, so what x and h have there does not count.
template <bool FIRST>
void back(const float* m, const float* dg, const float* x, const float* h, float* dx, float* dh, const Gate& gate,
          Gate& grad, const Plane& p) {
  Gate sum = grad;
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec d = load(dg + i), dm = vec{};
    sum.bias += d;
    for (int t = 0; t < 9; ++t) {
      sum.tap[t] += d * load(m + i + p.taps[t]);
      dm += gate.tap[t] * load(dg + i - p.taps[t]);
    }
    sum.x += dm * load(x + i);
    sum.h += dm * load(h + i);
    store(dx + i, FIRST ? gate.x * dm : load(dx + i) + gate.x * dm);
    store(dh + i, FIRST ? gate.h * dm : load(dh + i) + gate.h * dm);
  }
  grad = sum;
}

struct Maps {
  const float *x, *h, *c, *dh, *dc;  // dh, dc: gradients of the new state; null in the forward pass
  float *new_h, *new_c, *dx, *dh_old, *dc_old;
};

enum { X, H, C, DH, DC, DX, DHO, RH, MIX, ACT = MIX + 4, BUFFERS = ACT + 4 };

struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size;
  explicit Scratch(const Plane& p) : memory(new float[BUFFERS * p.size]()), size(p.size) {}
  float* operator[](int i) { return memory.get() + i * size; }
};

template <int CELL>
void forward(Scratch& s, const Gate* gate, const Plane& p) {
  for (int k = 0; k < (CELL == GRU ? 2 : GATES[CELL]); ++k) mix(s[X], s[H], s[MIX + k], gate[k], p);
  if (CELL == GRU) {
    for (int64_t i = p.begin; i < p.end; i += LANES)
      store(s[RH] + i, sigmoid(convolve(s[MIX], gate[0], p, i)) * load(s[H] + i));
    mix(s[X], s[RH], s[MIX + 2], gate[2], p);
  }
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    if (CELL == RNN) store(s[ACT] + i, hyperbolic(convolve(s[MIX], gate[0], p, i)));
    if (CELL == GRU) {
      vec h = load(s[H] + i), z = sigmoid(convolve(s[MIX + 1], gate[1], p, i));
      store(s[ACT] + i, h + z * (hyperbolic(convolve(s[MIX + 2], gate[2], p, i)) - h));
    }
    if (CELL == LSTM) {
      vec in = sigmoid(convolve(s[MIX], gate[0], p, i)), f = sigmoid(convolve(s[MIX + 1], gate[1], p, i));
      vec g = hyperbolic(convolve(s[MIX + 2], gate[2], p, i)), o = sigmoid(convolve(s[MIX + 3], gate[3], p, i));
      vec c = f * load(s[C] + i) + in * g;
      store(s[ACT + 1] + i, c);
      store(s[ACT] + i, o * hyperbolic(c));
    }
  }
}

void backward_rnn(Scratch& s, const Gate* gate, Gate* grad, const Plane& p) {
  mix(s[X], s[H], s[MIX], gate[0], p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec n = hyperbolic(convolve(s[MIX], gate[0], p, i));
    store(s[ACT] + i, load(s[DH] + i) * (1.0f - n * n));
  }
  back<true>(s[MIX], s[ACT], s[X], s[H], s[DX], s[DHO], gate[0], grad[0], p);
}

void backward_gru(Scratch& s, const Gate* gate, Gate* grad, const Plane& p) {
  float *r = s[ACT], *z = s[ACT + 1], *n = s[ACT + 2], *drh = s[ACT + 3];
  for (int k = 0; k < 2; ++k) mix(s[X], s[H], s[MIX + k], gate[k], p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec reset = sigmoid(convolve(s[MIX], gate[0], p, i));
    store(r + i, reset);
    store(s[RH] + i, reset * load(s[H] + i));
  }
  mix(s[X], s[RH], s[MIX + 2], gate[2], p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec d = load(s[DH] + i), update = sigmoid(convolve(s[MIX + 1], gate[1], p, i));
    vec candidate = hyperbolic(convolve(s[MIX + 2], gate[2], p, i));
    store(n + i, d * update * (1.0f - candidate * candidate));
    store(z + i, d * (candidate - load(s[H] + i)) * update * (1.0f - update));
    store(s[DC] + i, d * (1.0f - update));
  }
  back<true>(s[MIX + 2], n, s[X], s[RH], s[DX], drh, gate[2], grad[2], p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec reset = load(r + i), d = load(drh + i);
    store(s[DHO] + i, load(s[DC] + i) + d * reset);
    store(r + i, d * load(s[H] + i) * reset * (1.0f - reset));
  }
  back<false>(s[MIX], r, s[X], s[H], s[DX], s[DHO], gate[0], grad[0], p);
  back<false>(s[MIX + 1], z, s[X], s[H], s[DX], s[DHO], gate[1], grad[1], p);
}

void backward_lstm(Scratch& s, const Gate* gate, Gate* grad, const Plane& p) {
  float *di = s[ACT], *df = s[ACT + 1], *dg = s[ACT + 2], *dout = s[ACT + 3];
  for (int k = 0; k < 4; ++k) mix(s[X], s[H], s[MIX + k], gate[k], p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec in = sigmoid(convolve(s[MIX], gate[0], p, i)), f = sigmoid(convolve(s[MIX + 1], gate[1], p, i));
    vec g = hyperbolic(convolve(s[MIX + 2], gate[2], p, i)), o = sigmoid(convolve(s[MIX + 3], gate[3], p, i));
    vec old = load(s[C] + i), d = load(s[DH] + i), t = hyperbolic(f * old + in * g);
    vec dc = load(s[DC] + i) + d * o * (1.0f - t * t);
    store(di + i, dc * g * in * (1.0f - in));
    store(df + i, dc * old * f * (1.0f - f));
    store(dg + i, dc * in * (1.0f - g * g));
    store(dout + i, d * t * o * (1.0f - o));
    store(s[DC] + i, dc * f);
  }
  back<true>(s[MIX], di, s[X], s[H], s[DX], s[DHO], gate[0], grad[0], p);
  for (int k = 1; k < 4; ++k) back<false>(s[MIX + k], s[ACT + k], s[X], s[H], s[DX], s[DHO], gate[k], grad[k], p);
}

// One step for `count` images from n on, stacked.
template <int CELL>
void task(const Maps& maps, const Shape& shape, int64_t n, int64_t count, int64_t block, Scratch& s, const Gate* gate,
          Gate* grad, const Plane& p) {
  for (int64_t i = 0; i < p.stack; ++i) {
    const Window w(shape, p, n + i, block);
    const bool real = i < count;  // an empty place is zeros: what is added up there must add nothing
    w.in(real ? maps.x : nullptr, s[X], i);
    w.in(real ? maps.h : nullptr, s[H], i);
    if (CELL == LSTM) w.in(real ? maps.c : nullptr, s[C], i);
    if (grad) w.in(real ? maps.dh : nullptr, s[DH], i);
    if (grad && CELL == LSTM) w.in(real ? maps.dc : nullptr, s[DC], i);
  }
  if (!grad) forward<CELL>(s, gate, p);
  else if (CELL == RNN) backward_rnn(s, gate, grad, p);
  else if (CELL == GRU) backward_gru(s, gate, grad, p);
  else backward_lstm(s, gate, grad, p);
  for (int64_t i = 0; i < count; ++i) {
    const Window w(shape, p, n + i, block);
    w.out(s[grad ? DX : ACT], grad ? maps.dx : maps.new_h, i);
    if (grad) w.out(s[DHO], maps.dh_old, i);
    if (CELL == LSTM) w.out(s[grad ? DC : ACT + 1], grad ? maps.dc_old : maps.new_c, i);
  }
}

// Tasks are (chunk of the batch, block of channels); each chunk sums the parameters' gradients on its own.
template <int CELL>
void step(const Maps& maps, const Weights& weights, const Weights* grads, const Shape& shape, int64_t chunks,
          int64_t threads) {
  const Plane plane(shape, (shape.batch + chunks - 1) / chunks);
  const int64_t blocks = (shape.channels + plane.lanes - 1) / plane.lanes, rows = GATES[CELL] * shape.channels;
#pragma omp parallel num_threads(threads)
  {
    const Flush flush;
    Scratch scratch(plane);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < chunks * blocks; ++job) {
      const int64_t chunk = job / blocks, block = job % blocks, first = block * plane.lanes;
      Gate gate[4] = {}, grad[4] = {};
      const int64_t wide = Window(shape, plane, 0, block).wide;
      for (int k = 0; k < GATES[CELL]; ++k)
        parameters(gate[k], weights, [&](vec& v, float* from, int64_t apart) {
          v = take(from, k * shape.channels + first, apart, wide, shape.last);
        });
      const int64_t stop = (chunk + 1) * shape.batch / chunks;
      for (int64_t n = chunk * shape.batch / chunks; n < stop; n += plane.stack) {
        const int64_t count = stop - n < plane.stack ? stop - n : plane.stack;
        task<CELL>(maps, shape, n, count, block, scratch, gate, grads ? grad : nullptr, plane);
      }
      if (!grads) continue;
      const Weights part = {grads->mix + chunk * rows * 2, grads->weight + chunk * rows * 9, grads->bias + chunk * rows};
      for (int k = 0; k < GATES[CELL]; ++k)
        parameters(grad[k], part, [&](vec& v, float* to, int64_t apart) {
          give(to, v, k * shape.channels + first, apart, wide, shape.last);
        });
    }
  }
}

void run(int64_t cell, const Maps& maps, const Weights& weights, const Weights* grads, const int64_t* sizes, int64_t chunks,
         int64_t threads) {
  const Shape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] != 0};
  if (cell == RNN) step<RNN>(maps, weights, grads, shape, chunks, threads);
  if (cell == GRU) step<GRU>(maps, weights, grads, shape, chunks, threads);
  if (cell == LSTM) step<LSTM>(maps, weights, grads, shape, chunks, threads);
}

}  // namespace

// sizes: N, C, H, W and whether the maps are channels last. Maps of the old state and of gradients may be null.
extern "C" void regulate_forward(int64_t cell, const int64_t* sizes, int64_t chunks, int64_t threads, float* mix, float* weight,
                                 float* bias, const float* x, const float* h, const float* c, float* new_h,
                                 float* new_c) {
  const Maps maps = {x, h, c, nullptr, nullptr, new_h, new_c, nullptr, nullptr, nullptr};
  run(cell, maps, {mix, weight, bias}, nullptr, sizes, chunks, threads);
}

extern "C" void regulate_backward(int64_t cell, const int64_t* sizes, int64_t chunks, int64_t threads, float* mix, float* weight,
                                  float* bias, const float* x, const float* h, const float* c, const float* dh,
                                  const float* dc, float* dx, float* dh_old, float* dc_old, float* dmix, float* dweight,
                                  float* dbias) {
  const Maps maps = {x, h, c, dh, dc, nullptr, nullptr, dx, dh_old, dc_old};
  const Weights grads = {dmix, dweight, dbias};
  run(cell, maps, {mix, weight, bias}, &grads, sizes, chunks, threads);
}
