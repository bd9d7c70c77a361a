// What both Winograd kernels begin with: where tiles lie, what is read there, and the transform of its windows.
#pragma once

#include "common/activations.h"
#include "cpu/dispatch.h"
#include "cpu/vec.h"
#include "cpu/winograd.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// A tile's 4x4 window of the source and its 2x2 results, as numbers of pixels; -1 where there is none.
struct Place {
  int64_t source[kPoints];
  int64_t result[4];
  bool inside;  // the whole window

  FR_INLINE Place(const WinogradArgs& a, int64_t tile) {
    const int64_t column = tile % a.tile_columns * 2, rest = tile / a.tile_columns;
    const int64_t row = rest % a.tile_rows * 2, sample = rest / a.tile_rows;
    const int64_t top = row - a.pad_h, left = column - a.pad_w;
    inside = top >= 0 && left >= 0 && top + 4 <= a.height && left + 4 <= a.width;
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t s = 0; s < 4; ++s) {
        const int64_t h = top + r, w = left + s;
        const bool is_there = h >= 0 && h < a.height && w >= 0 && w < a.width;
        source[r * 4 + s] = is_there ? (sample * a.height + h) * a.width + w : -1;
      }
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t s = 0; s < 2; ++s) {
        const bool is_there = row + r < a.out_height && column + s < a.out_width;
        result[r * 2 + s] = is_there ? (sample * a.out_height + row + r) * a.out_width + column + s : -1;
      }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sources: what the convolution reads at a pixel
// ---------------------------------------------------------------------------------------------------------------------

struct PlainSource {
  Pixels x;
  FR_INLINE explicit PlainSource(const WinogradArgs& a) : x(a.x) {}
  template <class Extent>
  FR_INLINE Vec at(int64_t pixel, int64_t c, Extent extent) const {
    return load(x.data + pixel * x.pitch + c, extent);
  }
};

template <class Act>
struct PendingSource {
  Pixels x;
  const float *scale, *shift;
  Vec param;
  FR_INLINE explicit PendingSource(const WinogradArgs& a)
      : x(a.x), scale(a.scale), shift(a.shift), param(a.act_param) {}
  template <class Extent>
  FR_INLINE Vec at(int64_t pixel, int64_t c, Extent extent) const {
    const Vec value = load(x.data + pixel * x.pitch + c, extent);
    return Act::forward(fma(value, load(scale + c, extent), load(shift + c, extent)), param);
  }
};

struct GradientSource {
  Pixels g, y;
  const float *scale, *slope, *mean, *offset;
  FR_INLINE explicit GradientSource(const WinogradArgs& a)
      : g(a.x), y(a.y), scale(a.scale), slope(a.slope), mean(a.mean), offset(a.offset) {}
  template <class Extent>
  FR_INLINE Vec at(int64_t pixel, int64_t c, Extent extent) const {
    const Vec deviation = load(y.data + pixel * y.pitch + c, extent) - load(mean + c, extent);
    const Vec taken = fma(load(slope + c, extent), deviation, load(offset + c, extent));
    return load(scale + c, extent) * load(g.data + pixel * g.pitch + c, extent) - taken;
  }
};

template <class Body>
FR_INLINE void dispatch_source(const WinogradArgs& a, Body body) {
  if (a.source == WinogradSource::kPlain) return body(PlainSource(a));
  if (a.source == WinogradSource::kGradient) return body(GradientSource(a));
  dispatch_activation(a.act, [&](auto act) { body(PendingSource<decltype(act)>(a)); });
}

// ---------------------------------------------------------------------------------------------------------------------
// First step: B^T d B
// ---------------------------------------------------------------------------------------------------------------------

template <bool kInside, class Source, class Extent>
FR_INLINE void transform_window(const Source& source, const Place& place, int64_t c, int64_t plane, float* to,
                                Extent extent) {
  Vec d[4][4];
  for (int s = 0; s < 4; ++s) {
    Vec column[4];
    for (int r = 0; r < 4; ++r) {
      const int64_t pixel = place.source[r * 4 + s];
      column[r] = kInside || pixel >= 0 ? source.at(pixel, c, extent) : Vec();
    }
    d[0][s] = column[0] - column[2];
    d[1][s] = column[1] + column[2];
    d[2][s] = column[2] - column[1];
    d[3][s] = column[1] - column[3];
  }
  for (int r = 0; r < 4; ++r) {
    float* row = to + r * 4 * plane;
    store(row, d[r][0] - d[r][2]);
    store(row + plane, d[r][1] + d[r][2]);
    store(row + 2 * plane, d[r][2] - d[r][1]);
    store(row + 3 * plane, d[r][1] - d[r][3]);
  }
}

// The windows of tiles [first, first + count), channels [begin, end), as [point][tile][winograd_pitch(end - begin)].
template <class Source>
void transform_source(const WinogradArgs& a, const Source source, int64_t first, int64_t count, int64_t begin,
                      int64_t end, float* windows) {
  const int64_t pitch = winograd_pitch(end - begin), plane = count * pitch;
  for (int64_t i = 0; i < count; ++i) {
    const Place place(a, first + i);
    float* to = windows + i * pitch;
    for_each_vector(end - begin, [&](int64_t c, auto extent) {
      if (place.inside)
        transform_window<true>(source, place, begin + c, plane, to + c, extent);
      else
        transform_window<false>(source, place, begin + c, plane, to + c, extent);
    });
  }
}

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres
