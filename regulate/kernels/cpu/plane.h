// Where the pixels of a channel plane lie: in a map, in a task's scratch, and in the tiles of a loop over it.
//
// A scratch plane holds the same channel of some images side by side, so that loops over small ones stay long. In a row
// a pixel of zeros stands before each image, which is the right border of the one before, or of the row above; a row of
// zeros lies above all, and one below. So each of the nine taps is one constant offset and a plane of any size is one
// loop. A pixel is one float (NCHW: a vector covers pixels of a channel) or a vector (channels last: it covers channels
// of a pixel); only loading and storing know the difference.
#pragma once

#include "tasks.h"

namespace {

constexpr int64_t LONG = 1024;  // floats in a plane of small images: sixteen buffers stay near the core

struct Plane {
  int64_t side, image, stack, row, begin, end, size;  // of a pixel, of an image's row; how many images; all of their rows
  explicit Plane(const Shape& s) : side(s.side()), image((s.width + 1) * side) {
    const int64_t images = (s.batch + s.chunks - 1) / s.chunks;  // of a task, at most
    const int64_t one = image * s.height, stacks = (images * one + LONG - 1) / LONG;  // as many as it takes, evenly filled
    stack = one < LONG && stacks > 0 ? (images + stacks - 1) / stacks : 1;
    row = stack * image;
    begin = row + side;
    end = begin + s.height * row - side;
    size = end + row + side + LANES;
  }
};

// `count` floats of a row that `left` of the same map follow. Rows are short, so they are copied in whole vectors: what
// these write too much is zeros, or is overwritten by what comes next.
INLINE void row_in(const float* from, float* to, int64_t count, int64_t left) {
  int64_t x = 0;
  for (; x + LANES <= count; x += LANES) store(to + x, load(from + x));
  if (x == count) return;
  if (x + LANES <= left) store(to + x, masked(load(from + x), first_lanes(count - x)));
  else copy(to + x, from + x, count - x);
}

INLINE void row_out(const float* from, float* to, int64_t count, int64_t left) {
  int64_t x = 0;
  for (; x < count && x + LANES <= left; x += LANES) store(to + x, load(from + x));
  if (x < count) copy(to + x, from + x, count - x);
}

// Where a task's channels lie in a map, for a stack of images from n on, and how they get into and out of the scratch.
struct Window {
  Shape shape;
  Plane plane;
  int64_t count, wide, next, offset;
  Window(const Shape& s, const Plane& p, const Task& task, int64_t n)
      : shape(s), plane(p), count(std::min(p.stack, s.start(task.chunk + 1) - n)), wide(task.wide),
        next(s.channels * s.pixels()), offset(n * next + task.first * (s.last ? 1 : s.pixels())) {}
  // visit(where in the map, where in the scratch, how many floats of the same channel there are from there on).
  template <class Visit>
  MEMBER void rows(int64_t images, Visit visit) const {
    const int64_t step = shape.width * (shape.last ? shape.channels : 1), apart = next, wide = plane.image;
    int64_t at = plane.begin, from = offset, left = shape.pixels();
    for (; left > 0; left -= shape.width, from += step, at += plane.row)
      for (int64_t n = 0; n < images; ++n) visit(from + n * apart, at + n * wide, left);
  }
  // All bits of the images' pixels, none of the zeros around them.
  void mask(float* scratch) const {
    rows(plane.stack, [&](int64_t, int64_t at, int64_t) {
      std::memset(scratch + at, 255, 4 * shape.width * plane.side);
    });
  }
  // An empty place is zeros: what is added up there must add nothing.
  void in(const float* map, float* scratch) const {
    const Window w = *this;
    const int64_t floats = w.plane.end - w.plane.begin;  // none, and less, in an image of height 0
    if (floats > 0 && (!map || w.count < w.plane.stack)) std::memset(scratch + w.plane.begin, 0, 4 * floats);
    if (!map) return;
    if (w.shape.last) w.rows(w.count, [&](int64_t from, int64_t at, int64_t) { w.pixels_in(map + from, scratch + at); });
    else w.rows(w.count, [&](int64_t from, int64_t at, int64_t left) {
      row_in(map + from, scratch + at, w.shape.width, left);
    });
  }
  void out(const float* scratch, float* map) const {
    if (!map) return;
    const Window w = *this;
    if (w.shape.last) w.rows(w.count, [&](int64_t to, int64_t at, int64_t) { w.pixels_out(scratch + at, map + to); });
    else w.rows(w.count, [&](int64_t to, int64_t at, int64_t left) {
      row_out(scratch + at, map + to, w.shape.width, left);
    });
  }

 private:
  MEMBER void pixels_in(const float* from, float* to) const {
    for (int64_t x = 0; x < shape.width; ++x, from += shape.channels, to += LANES) {
      if (wide == LANES) store(to, load(from));
      else for (int lane = 0; lane < LANES; ++lane) to[lane] = lane < wide ? from[lane] : 0.0f;
    }
  }
  MEMBER void pixels_out(const float* from, float* to) const {
    for (int64_t x = 0; x < shape.width; ++x, to += shape.channels, from += LANES) {
      if (wide == LANES) store(to, load(from));
      else copy(to, from, wide);
    }
  }
};

// A part of a scratch plane, from begin to before end.
struct Span {
  int64_t begin, end;
};

// A loop over a plane in tiles, so that what one pass over a tile leaves is still near the core for the next pass.
// A convolution reaches beyond its tile: what it reads must be ready `ahead` of the tile, and where its gradient
// is spread, all of that must be there already `behind` it.
constexpr int64_t TILE = 512;

template <class Visit>
INLINE void tiles(const Plane& p, Visit visit) {
  const int64_t reach = (p.row + p.side + 2 * LANES - 1) / LANES * LANES;
  const auto inside = [&](int64_t i) { return i < p.begin ? p.begin : i < p.end ? i : p.end; };
  for (int64_t i = p.begin; i < p.end; i += TILE) {
    const bool first = i == p.begin, last = i + TILE >= p.end;
    const Span here = {i, inside(i + TILE)};
    const Span ahead = {first ? p.begin : inside(i + reach), inside(i + TILE + reach)};
    const Span behind = {inside(i - reach), last ? p.end : inside(i + TILE - reach)};
    visit(here, ahead, behind);
  }
}

}  // namespace
