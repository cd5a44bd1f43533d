// One gate of a light cell over a channel plane: its parameters, its mix, 3x3 and activation, and their gradients.
#pragma once

#include "plane.h"

namespace {

// The parameters of one gate for the channels of a task, or their gradients: mix, 3x3 and bias.
struct Gate {
  vec x, h, tap[9], bias;
};

struct Weights {
  float *mix, *weight, *bias;
};

// visit(parameter, where its values lie, how far apart per channel) for the gates whose first row is given.
template <class Visit>
INLINE void parameters(Gate* gates, int count, const Weights& w, int64_t row, int64_t channels, Visit visit) {
  for (Gate* gate = gates; gate < gates + count; ++gate, row += channels) {
    visit(gate->x, w.mix + 2 * row, 2);
    visit(gate->h, w.mix + 2 * row + 1, 2);
    for (int t = 0; t < 9; ++t) visit(gate->tap[t], w.weight + 9 * row + t, 9);
    visit(gate->bias, w.bias + row, 1);
  }
}

void mix(const float* x, const float* h, float* m, const Gate& gate, Span at) {
  const vec of_x = gate.x, of_h = gate.h;
  for (int64_t i = at.begin; i < at.end; i += LANES) store(m + i, of_x * load(x + i) + of_h * load(h + i));
}

// The 3x3 around each pixel of a vector: visit(tap, pixels).
template <class Visit>
INLINE void around(const float* plane, const Plane& p, int64_t i, Visit visit) {
  const int64_t row = p.row, side = p.side;
  for (int y = 0; y < 3; ++y) {
    const float* line = plane + (y - 1) * row + i;
    visit(3 * y, load(line - side));
    visit(3 * y + 1, load(line));
    visit(3 * y + 2, load(line + side));
  }
}

// One gate in a loop of its own: all in one would be a chain of dependent operations too long for the processor to
// overlap one vector's with the next one's. Gates and planes are copied, here and below, because the compiler must take
// it that a store changes what it reads through a reference.
template <class Activation>
INLINE void activate(const float* m, float* to, const Gate& from, const Plane& plane, Span at) {
  Gate gate = from;
  for (vec& tap : gate.tap) tap *= Activation::FACTOR;
  gate.bias *= Activation::FACTOR;
  const Plane p = plane;
  for (int64_t i = at.begin; i < at.end; i += LANES) {
    vec sums[3] = {gate.bias, vec{}, vec{}};
    around(m, p, i, [&](int t, vec v) { sums[t / 3] += gate.tap[t] * v; });
    store(to + i, Activation::of(sums[0] + sums[1] + sums[2]));
  }
}

// From dg, the gradient of a gate before its activation, to those of its parameters, of x and of h (or of r.h).
// dg must be zero on the border. That of the state is, but what it is multiplied by may be NaN there: a gate on the
// border sees the pixels beside it, and on its other side is the next row, or another image. Hence the mask.
template <bool FIRST>
void back(const float* m, const float* dg, const float* x, const float* h, float* dx, float* dh, const Gate& from,
          Gate& grad, const Plane& plane, Span at) {
  const Gate gate = from;
  const Plane p = plane;
  Gate sum = grad;
  const auto give = [&](int64_t i, const vec (&dm)[3]) {
    const vec d = dm[0] + dm[1] + dm[2];
    sum.x += d * load(x + i);
    sum.h += d * load(h + i);
    store(dx + i, FIRST ? gate.x * d : load(dx + i) + gate.x * d);
    store(dh + i, FIRST ? gate.h * d : load(dh + i) + gate.h * d);
  };
  // Nine sums and nine taps: in one loop where there are registers for all of them.
  constexpr bool TOGETHER = REGISTERS > 16;
  for (int64_t i = at.begin; i < at.end; i += LANES) {
    const vec here = load(m + i);
    vec dm[3] = {};
    // A tap's sum from the side of the pixel that it reads, so that it takes the same gradients as dm.
    around(dg, p, i, [&](int t, vec d) {
      if (TOGETHER) d = kept(d);
      sum.tap[8 - t] += d * here;
      if (t == 4) sum.bias += d;
      if (TOGETHER) dm[t / 3] += gate.tap[8 - t] * d;
    });
    if (TOGETHER) give(i, dm);
  }
  for (int64_t i = at.begin; !TOGETHER && i < at.end; i += LANES) {
    vec dm[3] = {};
    around(dg, p, i, [&](int t, vec d) { dm[t / 3] += gate.tap[8 - t] * d; });
    give(i, dm);
  }
  grad = sum;
}

}  // namespace
