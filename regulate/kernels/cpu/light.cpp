// One step of a light cell on the CPU, forward and backward, one channel plane after the other.
//
// Group i of the mix sees X_i and H_i alone and the 3x3 is depthwise, so a step never leaves its plane: load X,
// H and C into a padded scratch that stays in the cache, do everything there, store H and C. The backward computes
// the gates again, so that no map is kept for it but what goes in; only an RNN's gate is there anyway, it is H.

#include "gate.h"

namespace {

enum Cell { RNN = 0, GRU = 1, LSTM = 2 };
constexpr int GATES[] = {1, 3, 4};

// dh, dc: gradients of the new state, null in the forward pass. `out` and `memory`: the new state, or in the backward pass
// the gradients of x and of the old cell state.
struct Maps {
  const float *x, *h, *c, *dh, *dc;
  float *out, *memory, *dh_old;
};

enum { X, H, C, DH, DC, DX, DHO, RH, MASK, MIX, ACT = MIX + 4, BUFFERS = ACT + 4 };

// What is asked of memory while a plane is computed with: the maps of the plane that comes next, and the places of this
// one's results.
struct Ahead {
  const float* places[8] = {};
  int64_t pixels = 0;
  void fetch(const Plane& p, Span at) const {
    constexpr int64_t line = 16;
    const int64_t begin = at.begin - p.begin, end = at.end - p.begin < pixels ? at.end - p.begin : pixels;
    for (const float* place : places)
      for (int64_t i = begin; place && i < end; i += line) __builtin_prefetch(place + i);
  }
};

struct Scratch {
  std::unique_ptr<float[]> memory;  // null if there was none to be had
  int64_t size;
  Ahead ahead;
  Scratch(const Shape& shape, const Plane& p) : memory(new (std::nothrow) float[BUFFERS * p.size]()), size(p.size) {
    if (memory) Window(shape, p, Task(shape, 0, 0), 0).mask((*this)[MASK]);
  }
  float* operator[](int i) { return memory.get() + i * size; }
};

// Some gates of a tile, from their mix, of x and h, to their activation: tanh for the candidate, a sigmoid for others.
template <int FIRST, int LAST, int CANDIDATE>
INLINE void gates(Scratch& s, const float* h, const Gate* gate, const Plane& p, Span here, Span ahead) {
  for (int k = FIRST; k <= LAST; ++k) {
    mix(s[X], h, s[MIX + k], gate[k], ahead);
    if (k == CANDIDATE) activate<Hyperbolic>(s[MIX + k], s[ACT + k], gate[k], p, here);
    else activate<Sigmoid>(s[MIX + k], s[ACT + k], gate[k], p, here);
  }
}

void forward_rnn(Scratch& s, const Gate* gate, const Plane& p) {
  tiles(p, [&](Span here, Span ahead, Span) {
    s.ahead.fetch(p, here);
    gates<0, 0, 0>(s, s[H], gate, p, here, ahead);
  });
}

void backward_rnn(Scratch& s, const Gate* gate, Gate* grad, const Plane& p) {
  tiles(p, [&](Span here, Span ahead, Span behind) {
    s.ahead.fetch(p, here);
    mix(s[X], s[H], s[MIX], gate[0], ahead);
    for (int64_t i = here.begin; i < here.end; i += LANES) {
      vec n = load(s[C] + i);
      store(s[ACT] + i, load(s[DH] + i) * (1.0f - n * n));
    }
    back<true>(s[MIX], s[ACT], s[X], s[H], s[DX], s[DHO], gate[0], grad[0], p, behind);
  });
}

// r, z and r.H, and the candidate: in two passes over the whole plane, as the second convolution reads r.H.
void gru_gates(Scratch& s, const Gate* gate, const Plane& p) {
  const float *r = s[ACT], *mask = s[MASK];
  tiles(p, [&](Span here, Span ahead, Span) {
    s.ahead.fetch(p, here);
    gates<0, 1, 2>(s, s[H], gate, p, here, ahead);
    for (int64_t i = here.begin; i < here.end; i += LANES)
      store(s[RH] + i, masked(load(r + i) * load(s[H] + i), load(mask + i)));
  });
  tiles(p, [&](Span here, Span ahead, Span) { gates<2, 2, 2>(s, s[RH], gate, p, here, ahead); });
}

void forward_gru(Scratch& s, const Gate* gate, const Plane& p) {
  float *new_h = s[ACT], *z = s[ACT + 1], *n = s[ACT + 2];  // in the place of r
  gru_gates(s, gate, p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec h = load(s[H] + i);
    store(new_h + i, h + load(z + i) * (load(n + i) - h));
  }
}

void backward_gru(Scratch& s, const Gate* gate, Gate* grad, const Plane& p) {
  float *r = s[ACT], *z = s[ACT + 1], *n = s[ACT + 2], *drh = s[ACT + 3];
  const float* mask = s[MASK];
  const Span all = {p.begin, p.end};
  gru_gates(s, gate, p);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec d = load(s[DH] + i), update = load(z + i), candidate = load(n + i);
    store(n + i, masked(d * update * (1.0f - candidate * candidate), load(mask + i)));
    store(z + i, masked(d * (candidate - load(s[H] + i)) * update * (1.0f - update), load(mask + i)));
    store(s[DC] + i, d * (1.0f - update));
  }
  back<true>(s[MIX + 2], n, s[X], s[RH], s[DX], drh, gate[2], grad[2], p, all);
  for (int64_t i = p.begin; i < p.end; i += LANES) {
    vec reset = load(r + i), d = load(drh + i);
    store(s[DHO] + i, load(s[DC] + i) + d * reset);
    store(r + i, masked(d * load(s[H] + i) * reset * (1.0f - reset), load(mask + i)));
  }
  back<false>(s[MIX], r, s[X], s[H], s[DX], s[DHO], gate[0], grad[0], p, all);
  back<false>(s[MIX + 1], z, s[X], s[H], s[DX], s[DHO], gate[1], grad[1], p, all);
}

void forward_lstm(Scratch& s, const Gate* gate, const Plane& p) {
  float *in = s[ACT], *f = s[ACT + 1], *g = s[ACT + 2], *o = s[ACT + 3];
  tiles(p, [&](Span here, Span ahead, Span) {
    s.ahead.fetch(p, here);
    gates<0, 3, 2>(s, s[H], gate, p, here, ahead);
    for (int64_t i = here.begin; i < here.end; i += LANES) {
      vec c = load(f + i) * load(s[C] + i) + load(in + i) * load(g + i);
      store(s[ACT] + i, load(o + i) * hyperbolic(c));
      store(s[ACT + 1] + i, c);
    }
  });
}

void backward_lstm(Scratch& s, const Gate* gate, Gate* grad, const Plane& p) {
  float *di = s[ACT], *df = s[ACT + 1], *dg = s[ACT + 2], *dout = s[ACT + 3];
  const float* mask = s[MASK];
  tiles(p, [&](Span here, Span ahead, Span behind) {
    s.ahead.fetch(p, here);
    gates<0, 3, 2>(s, s[H], gate, p, here, ahead);
    for (int64_t i = here.begin; i < here.end; i += LANES) {
      vec in = load(di + i), f = load(df + i), g = load(dg + i), o = load(dout + i);
      vec old = load(s[C] + i), d = load(s[DH] + i), t = hyperbolic(f * old + in * g);
      vec dc = load(s[DC] + i) + d * o * (1.0f - t * t);
      store(di + i, masked(dc * g * in * (1.0f - in), load(mask + i)));
      store(df + i, masked(dc * old * f * (1.0f - f), load(mask + i)));
      store(dg + i, masked(dc * in * (1.0f - g * g), load(mask + i)));
      store(dout + i, masked(d * t * o * (1.0f - o), load(mask + i)));
      store(s[DC] + i, dc * f);
    }
    back<true>(s[MIX], di, s[X], s[H], s[DX], s[DHO], gate[0], grad[0], p, behind);
    for (int k = 1; k < 4; ++k)
      back<false>(s[MIX + k], s[ACT + k], s[X], s[H], s[DX], s[DHO], gate[k], grad[k], p, behind);
  });
}

// Images so small that they are stacked are near anyway, and channels last have a plane's pixels apart.
Ahead ahead(const Maps& maps, const Window& here, const Window& next) {
  if (here.plane.stack > 1 || here.shape.last) return {};
  const auto at = [](const float* map, const Window& w) { return map ? map + w.offset : nullptr; };
  return {{at(maps.x, next), at(maps.h, next), at(maps.c, next), at(maps.dh, next), at(maps.dc, next), at(maps.out, here),
           at(maps.memory, here), at(maps.dh_old, here)},
          here.shape.pixels()};
}

// One step for the images of a window.
template <int CELL>
void images(const Maps& maps, const Window& w, const Window& next, Scratch& s, const Gate* gate, Gate* grad,
            const Plane& p) {
  s.ahead = ahead(maps, w, next);
  w.in(maps.x, s[X]);
  w.in(maps.h, s[H]);
  if (CELL == LSTM || (grad && CELL == RNN)) w.in(maps.c, s[C]);
  if (grad) w.in(maps.dh, s[DH]);
  if (grad && CELL == LSTM) w.in(maps.dc, s[DC]);
  if (CELL == RNN) grad ? backward_rnn(s, gate, grad, p) : forward_rnn(s, gate, p);
  if (CELL == GRU) grad ? backward_gru(s, gate, grad, p) : forward_gru(s, gate, p);
  if (CELL == LSTM) grad ? backward_lstm(s, gate, grad, p) : forward_lstm(s, gate, p);
  w.out(s[grad ? DX : ACT], maps.out);
  if (CELL == LSTM) w.out(s[grad ? DC : ACT + 1], maps.memory);
  w.out(s[DHO], maps.dh_old);
}

// Each task sums the parameters' gradients of its chunk and channels on its own. An exception would not leave the
// parallel region but end the process, so what comes back says whether memory was missing.
template <int CELL>
int step(const Maps& maps, const Weights& weights, const Weights* grads, const Shape& shape, int64_t threads) {
  const Plane plane(shape);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const Flush flush;
    Scratch scratch(shape, plane);
    tasks(shape, [&](const Task& task) {
      failed |= !scratch.memory;
      if (failed) return;
      Gate gate[4] = {}, grad[4] = {};
      parameters(gate, GATES[CELL], weights, 0, shape.channels, [&](vec& v, const float* from, int64_t apart) {
        v = take(from, apart, shape, task);
      });
      const Task beside(shape, task.chunk, std::min(task.block + 1, shape.blocks() - 1));
      const int64_t start = shape.start(task.chunk), stop = shape.start(task.chunk + 1);
      for (int64_t n = start; n < stop; n += plane.stack) {
        const int64_t more = n + plane.stack;
        const Window next = more < stop ? Window(shape, plane, task, more) : Window(shape, plane, beside, start);
        images<CELL>(maps, Window(shape, plane, task, n), next, scratch, gate, grads ? grad : nullptr, plane);
      }
      if (!grads) return;
      const int64_t row = task.chunk * GATES[CELL] * shape.channels;
      parameters(grad, GATES[CELL], *grads, row, shape.channels, [&](vec& v, float* to, int64_t apart) {
        give(to, v, apart, shape, task);
      });
    });
  }
  return failed;
}

}  // namespace

// sizes and chunks: see Shape. Maps of the old state and of gradients may be null, those of what is not asked for are; so
// are dmix, dweight and dbias in the forward pass. c is the old cell state of an LSTM; in the backward of an RNN it is the
// new hidden state. What comes back, here and in norm.cpp, is 0, or 1 if memory was missing.
extern "C" int regulate_step(const int64_t* sizes, int64_t chunks, int64_t threads, int64_t cell, float* mix,
                             float* weight, float* bias, const float* x, const float* h, const float* c,
                             const float* dh, const float* dc, float* out, float* memory, float* dh_old, float* dmix,
                             float* dweight, float* dbias) {
  const Maps maps = {x, h, c, dh, dc, out, memory, dh_old};
  const Weights weights = {mix, weight, bias}, grads = {dmix, dweight, dbias};
  const auto run = cell == RNN ? step<RNN> : cell == GRU ? step<GRU> : step<LSTM>;
  return run(maps, weights, dmix ? &grads : nullptr, Shape(sizes, chunks), threads);
}

// What this was compiled for, and how many floats its vectors have.
extern "C" const char* regulate_instruction_set() { return INSTRUCTION_SET; }

extern "C" int64_t regulate_lanes() { return LANES; }
