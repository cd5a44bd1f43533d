// Where the pixels of a channel plane lie: in a map, in a task's scratch, and in the tiles of a loop over it.
//
// A scratch plane is flat. A row holds W pixels behind one pixel of zeros, which is the right border of the row
// above as well, so each of the nine taps is one constant offset and a plane of any size is one loop. Small planes
// of a channel are stacked, a row of zeros between them, so that loops stay long. A pixel is one float (NCHW: a
// vector covers pixels of a channel) or a vector (channels last: it covers channels of a pixel); only loading and
// storing know the difference.
#pragma once

#include "vec.h"

namespace {

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

// All bits in the first lanes, none in the others: a window on `left` of the former.
alignas(64) const int32_t EDGE[2 * LANES] = {
#if defined(__AVX512F__)
    -1, -1, -1, -1, -1, -1, -1, -1,
#endif
#if defined(__AVX2__)
    -1, -1, -1, -1,
#endif
    -1, -1, -1, -1};

INLINE vec first_lanes(int64_t left) { return load((const float*)EDGE + LANES - left); }

// Where a task's channels lie in a map and how they get into and out of the scratch, image by image in the order of
// their places. Rows are short, so they are copied in whole vectors: what these write too much is zeros, where they go
// into the scratch, and overwritten by the next row.
struct Window {
  const Shape& shape;
  const Plane& plane;
  int64_t offset, wide;
  Window(const Shape& s, const Plane& p, int64_t n, int64_t block) : shape(s), plane(p) {
    int64_t first = block * p.lanes, pixels = s.height * s.width;
    wide = s.channels - first < p.lanes ? s.channels - first : p.lanes;
    offset = s.last ? n * pixels * s.channels + first : (n * s.channels + first) * pixels;
  }
  // All bits of the image's pixels, none of the zeros around them.
  void mask(float* scratch, int64_t place) const {
    for (int64_t y = 0; y < shape.height; ++y)
      std::memset(scratch + plane.begin + place * plane.image + y * plane.row, 255, 4 * shape.width * plane.lanes);
  }
  void in(const float* map, float* scratch, int64_t place) const {
    float* to = scratch + plane.begin + place * plane.image;
    for (int64_t y = 0; y < shape.height; ++y, to += plane.row) {
      if (!map) std::memset(to, 0, 4 * shape.width * plane.lanes);
      else if (shape.last) pixels_in(map + offset + y * shape.width * shape.channels, to);
      else row_in(map + offset + y * shape.width, to, (shape.height - y) * shape.width);
    }
  }
  void out(const float* scratch, float* map, int64_t place) const {
    if (!map) return;
    const float* from = scratch + plane.begin + place * plane.image;
    for (int64_t y = 0; y < shape.height; ++y, from += plane.row) {
      if (shape.last) pixels_out(from, map + offset + y * shape.width * shape.channels);
      else row_out(from, map + offset + y * shape.width, (shape.height - y) * shape.width);
    }
  }

 private:
  // `left`: the floats of the plane in the map from this row on.
  MEMBER void row_in(const float* from, float* to, int64_t left) const {
    int64_t x = 0;
    for (; x + LANES <= shape.width; x += LANES) store(to + x, load(from + x));
    if (x == shape.width) return;
    if (x + LANES <= left) store(to + x, masked(load(from + x), first_lanes(shape.width - x)));
    else copy(to + x, from + x, shape.width - x);
  }
  MEMBER void row_out(const float* from, float* to, int64_t left) const {
    int64_t x = 0;
    for (; x < shape.width && x + LANES <= left; x += LANES) store(to + x, load(from + x));
    if (x < shape.width) copy(to + x, from + x, shape.width - x);
  }
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
  const int64_t reach = (p.taps[8] + 2 * LANES - 1) / LANES * LANES;
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
