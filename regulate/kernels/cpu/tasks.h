// The shape of maps, and how the work over them is cut into tasks: a chunk of the batch for a block of channels. A block
// is one channel (NCHW: a vector covers pixels of it) or a vector of channels (channels last).
#pragma once

#include <algorithm>

#include "vec.h"

namespace {

struct Shape {
  int64_t batch, channels, height, width, chunks;
  bool last;  // channels last
  // sizes: N, C, H, W and whether the maps are channels last.
  Shape(const int64_t* sizes, int64_t parts)
      : batch(sizes[0]), channels(sizes[1]), height(sizes[2]), width(sizes[3]), chunks(parts), last(sizes[4] != 0) {}
  int64_t pixels() const { return height * width; }
  double values() const { return (double)batch * pixels(); }  // of a channel
  int64_t side() const { return last ? LANES : 1; }  // channels of a block
  int64_t blocks() const { return (channels + side() - 1) / side(); }
  int64_t start(int64_t chunk) const { return chunk * batch / chunks; }  // its first image
};

struct Task {
  int64_t chunk, block, first, wide;  // the first channel, and how many
  Task(const Shape& s, int64_t chunk, int64_t block)
      : chunk(chunk), block(block), first(block * s.side()), wide(std::min(s.side(), s.channels - first)) {}
};

// visit(task) for each, shared by the threads of the parallel region that this is called in.
template <class Visit>
INLINE void tasks(const Shape& s, Visit visit) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < s.chunks * s.blocks(); ++i) visit(Task(s, i / s.blocks(), i % s.blocks()));
}

// The values of one parameter, `apart` per channel: the same for all lanes of a vector, or one for each.
INLINE vec take(const float* values, int64_t apart, const Shape& s, const Task& task) {
  const float* first = values + task.first * apart;
  return s.last ? part(first, task.wide, apart) : broadcast(*first);
}

INLINE void give(float* values, vec v, int64_t apart, const Shape& s, const Task& task) {
  if (!s.last) values[task.first * apart] = total(v);
  else for (int64_t lane = 0; lane < task.wide; ++lane) values[(task.first + lane) * apart] = v[lane];
}

}  // namespace
