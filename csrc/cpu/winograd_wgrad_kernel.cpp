#include <utility>

#include "cpu/winograd_window.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// First step: A dy A^T
// ---------------------------------------------------------------------------------------------------------------------

// A of two values: four.
FR_INLINE void spread(Vec first, Vec second, Vec (&to)[4]) {
  to[0] = first;
  to[1] = first + second;
  to[2] = first - second;
  to[3] = Vec() - second;
}

template <class Extent>
FR_INLINE void transform_gradient(const Pixels& grad, const Place& place, int64_t k, int64_t plane, float* to,
                                  Extent extent) {
  Vec g[4], columns[2][4];
  for (int i = 0; i < 4; ++i) {
    const int64_t pixel = place.result[i];
    g[i] = pixel >= 0 ? load(grad.data + pixel * grad.pitch + k, extent) : Vec();
  }
  for (int s = 0; s < 2; ++s) spread(g[s], g[2 + s], columns[s]);
  for (int r = 0; r < 4; ++r) {
    Vec row[4];
    spread(columns[0][r], columns[1][r], row);
    for (int s = 0; s < 4; ++s) store(to + (r * 4 + s) * plane, row[s]);
  }
}

void transform_gradients(const WinogradWgradArgs& a, const WinogradWgradTask& t, int64_t first, int64_t count) {
  const int64_t filters = t.k_end - t.k_begin, pitch = winograd_pitch(filters), plane = count * pitch;
  for (int64_t i = 0; i < count; ++i) {
    const Place place(a.conv, first + i);
    float* to = t.grads + i * pitch;
    for_each_vector(filters, [&](int64_t k, auto extent) {
      transform_gradient(a.grad, place, t.k_begin + k, plane, to + k, extent);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Second step: a matrix product for every point
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kColumns = 2;                        // vectors of channels that registers hold sums for
constexpr int kRows = Vec::kWidth == 16 ? 14 : 6;  // and filters

struct Pitches {
  int64_t window, grads;
};

// sums[k][c] += sum over tiles of grads[tile][k] window[tile][c], for kFilters filters and kColumns vectors of
// channels. A block is summed on its own first, so that rounding errors grow with the block and with the number of
// blocks, not with their product.
template <int kFilters>
void multiply_block(const float* window, const float* grads, Pitches pitches, int64_t count, bool first, float* sums) {
  Vec acc[kFilters][kColumns];
  for (int64_t i = 0; i < count; ++i, window += pitches.window, grads += pitches.grads) {
    Vec values[kColumns];
    for (int j = 0; j < kColumns; ++j) values[j] = load(window + j * Vec::kWidth);
    for (int k = 0; k < kFilters; ++k) {
      const Vec g(grads[k]);
      for (int j = 0; j < kColumns; ++j) acc[k][j] = fma(g, values[j], acc[k][j]);
    }
  }
  for (int k = 0; k < kFilters; ++k)
    for (int j = 0; j < kColumns; ++j) {
      float* to = sums + k * pitches.window + j * Vec::kWidth;
      store(to, first ? acc[k][j] : load(to) + acc[k][j]);
    }
}

using MultiplyBlock = void (*)(const float*, const float*, Pitches, int64_t, bool, float*);

// multiply_block for 1 to kRows filters.
template <int... kFilters>
FR_INLINE MultiplyBlock multiply_block_for(int64_t filters, std::integer_sequence<int, kFilters...>) {
  constexpr MultiplyBlock kVariants[] = {&multiply_block<kFilters + 1>...};
  return kVariants[filters - 1];
}

void multiply(const WinogradWgradTask& t, int64_t count, bool first) {
  const int64_t filters = t.k_end - t.k_begin, channels = t.c_end - t.c_begin;
  const Pitches pitches{winograd_pitch(channels), winograd_pitch(filters)};
  const int64_t groups = (filters + kRows - 1) / kRows;  // of filters, all but equal
  for (int64_t point = 0; point < kPoints; ++point)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = filters * group / groups, end = filters * (group + 1) / groups;
      const auto run = multiply_block_for(end - begin, std::make_integer_sequence<int, kRows>{});
      const float* grads = t.grads + point * count * pitches.grads + begin;
      float* sums = t.sums + (point * filters + begin) * pitches.window;
      for (int64_t c = 0; c < channels; c += kColumns * Vec::kWidth)
        run(t.window + point * count * pitches.window + c, grads, pitches, count, first, sums + c);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Third step: G^T [..] G
// ---------------------------------------------------------------------------------------------------------------------

// G^T of four values: three.
FR_INLINE void gather(const Vec (&m)[4], Vec (&to)[3]) {
  const Vec half(0.5f), sum = half * (m[1] + m[2]);
  to[0] = m[0] + sum;
  to[1] = half * (m[1] - m[2]);
  to[2] = sum + m[3];
}

FR_INLINE void transform_sums(const float* sums, int64_t plane, Vec (&taps)[9]) {
  Vec rows[3][4];
  for (int s = 0; s < 4; ++s) {
    Vec column[4], gathered[3];
    for (int r = 0; r < 4; ++r) column[r] = load(sums + (r * 4 + s) * plane);
    gather(column, gathered);
    for (int r = 0; r < 3; ++r) rows[r][s] = gathered[r];
  }
  for (int r = 0; r < 3; ++r) {
    Vec gathered[3];
    gather(rows[r], gathered);
    for (int s = 0; s < 3; ++s) taps[r * 3 + s] = gathered[s];
  }
}

template <class Extent>
FR_INLINE void put_taps(const WinogradWgradArgs& a, const Vec (&taps)[9], float* to, int64_t n, Extent extent) {
  for (int i = 0; i < 9; ++i) {
    float* tap = to + i / 3 * a.out_stride_h + i % 3 * a.out_stride_w;
    if (a.out_stride_c == 1) {
      store(tap, taps[i], extent);
    } else {
      float values[Vec::kWidth];
      store(values, taps[i]);
      for (int64_t c = 0; c < n; ++c) tap[c * a.out_stride_c] = values[c];
    }
  }
}

bool write_out(const WinogradWgradArgs& a, const WinogradWgradTask& t) {
  const int64_t filters = t.k_end - t.k_begin, channels = t.c_end - t.c_begin, pitch = winograd_pitch(channels);
  Vec nothing;  // unless a value is not finite
  for (int64_t k = 0; k < filters; ++k)
    for_each_vector(channels, [&](int64_t c, auto extent) {
      Vec taps[9];
      transform_sums(t.sums + k * pitch + c, filters * pitch, taps);
      for (const Vec& tap : taps) nothing = fma(tap, Vec(0.f), nothing);
      const int64_t left = channels - c;
      put_taps(a, taps, a.out + (t.k_begin + k) * a.out_stride_k + (t.c_begin + c) * a.out_stride_c,
               left < Vec::kWidth ? left : Vec::kWidth, extent);
    });
  return !any_nan(nothing);
}

}  // namespace

bool winograd_wgrad_task(const WinogradWgradArgs& args, const WinogradWgradTask& task) {
  const WinogradArgs& conv = args.conv;
  for (int64_t first = 0; first < conv.tiles; first += kWgradTiles) {
    const int64_t left = conv.tiles - first, count = left < kWgradTiles ? left : kWgradTiles;
    dispatch_source(conv, [&](const auto source) {
      transform_source(conv, source, first, count, task.c_begin, task.c_end, task.window);
    });
    transform_gradients(args, task, first, count);
    multiply(task, count, first == 0);
  }
  return write_out(args, task);
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
