#include <utility>

#include "cpu/moments.h"
#include "cpu/winograd_window.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Second step: a matrix product for every point
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kColumns = 2;                        // vectors of filters that registers hold sums for
constexpr int kRows = Vec::kWidth == 16 ? 14 : 6;  // and tiles

// products[r][k] = sum over c of window[r][c] weights[c][k] for kTiles tiles and one panel of filters.
template <int kTiles>
void multiply_panel(const float* window, int64_t window_pitch, const float* weights, int64_t channels, float* products,
                    int64_t products_pitch) {
  for (int64_t k = 0; k < kPanel; k += kColumns * Vec::kWidth) {
    Vec sums[kTiles][kColumns];
    const float* w = weights + k;
    for (int64_t c = 0; c < channels; ++c, w += kPanel) {
      Vec filters[kColumns];
      for (int j = 0; j < kColumns; ++j) filters[j] = load(w + j * Vec::kWidth);
      for (int r = 0; r < kTiles; ++r) {
        const Vec value(window[r * window_pitch + c]);
        for (int j = 0; j < kColumns; ++j) sums[r][j] = fma(value, filters[j], sums[r][j]);
      }
    }
    for (int r = 0; r < kTiles; ++r)
      for (int j = 0; j < kColumns; ++j) store(products + r * products_pitch + k + j * Vec::kWidth, sums[r][j]);
  }
}

using MultiplyPanel = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);

// multiply_panel for 1 to kRows tiles.
template <int... kTiles>
FR_INLINE MultiplyPanel multiply_panel_for(int64_t tiles, std::integer_sequence<int, kTiles...>) {
  constexpr MultiplyPanel kVariants[] = {&multiply_panel<kTiles + 1>...};
  return kVariants[tiles - 1];
}

void multiply(const WinogradArgs& a, const WinogradTask& t) {
  const int64_t window_pitch = winograd_pitch(a.channels), products_pitch = winograd_pitch(t.k_end - t.k_begin);
  const int64_t groups = (t.count + kRows - 1) / kRows;  // of tiles, all but equal
  for (int64_t point = 0; point < kPoints; ++point)
    for (int64_t k = t.k_begin; k < t.k_end; k += kPanel) {
      const float* weights = a.weights + (k / kPanel * kPoints + point) * a.channels * kPanel;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = t.count * group / groups, end = t.count * (group + 1) / groups;
        multiply_panel_for(end - begin, std::make_integer_sequence<int, kRows>{})(
            t.window + (point * t.count + begin) * window_pitch, window_pitch, weights, a.channels,
            t.products + (point * t.count + begin) * products_pitch + k - t.k_begin, products_pitch);
      }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Results: what becomes of the convolution's value at a pixel, for one vector of filters
// ---------------------------------------------------------------------------------------------------------------------

template <class Extent>
FR_INLINE Vec load_or_zero(const float* p, int64_t k, Extent extent) {
  return p ? load(p + k, extent) : Vec();
}

// A tile's four results are handed over together; what is summed comes after all tiles of a block.
template <class Extent>
class StatisticsResult {
 public:
  FR_INLINE StatisticsResult(const WinogradArgs& a, const WinogradTask& t, int64_t k, Extent extent)
      : a_(a), t_(t), k_(k), extent_(extent), bias_(load_or_zero(a.bias, k, extent)) {}

  FR_INLINE void put(int64_t pixel, Vec value) {
    const Vec y = value + bias_;
    store(a_.out + pixel * a_.out_pitch + k_, y, extent_);
    sum_ = sum_ + y;
    ++count_;
  }

  FR_INLINE void finish() const {
    if (!a_.statistics) return;
    Vec mean, correction, square;
    split_mean(sum_, count_, mean, correction);
    for (int64_t i = 0; i < t_.count; ++i) {
      const Place place(a_, t_.first + i);
      Vec tile_square;
      for (const int64_t pixel : place.result) {
        if (pixel < 0) continue;
        const Vec d = load(a_.out + pixel * a_.out_pitch + k_, extent_) - mean;
        tile_square = fma(d, d, tile_square);
      }
      square = square + tile_square;
    }
    const int64_t at = t_.block * a_.filters + k_;
    store(a_.partials.mean + at, mean, extent_);
    store(a_.partials.correction + at, correction, extent_);
    store(a_.partials.m2 + at, square - Vec(static_cast<float>(count_)) * correction * correction, extent_);
  }

 private:
  const WinogradArgs& a_;
  const WinogradTask& t_;
  const int64_t k_;
  const Extent extent_;
  const Vec bias_;
  Sum<float> sum_;
  int64_t count_ = 0;
};

template <class Act, bool kAdds, class Extent>
class JoinResult {
 public:
  FR_INLINE JoinResult(const WinogradArgs& a, const WinogradTask&, int64_t k, Extent extent)
      : a_(a), k_(k), extent_(extent), param_(a.out_act_param), bias_(load_or_zero(a.bias, k, extent)) {}

  FR_INLINE void put(int64_t pixel, Vec value) const {
    Vec z = value + bias_;
    if constexpr (kAdds) z = z + load(a_.residual.data + pixel * a_.residual.pitch + k_, extent_);
    store(a_.out + pixel * a_.out_pitch + k_, Act::forward(z, param_), extent_);
  }

  FR_INLINE void finish() const {}

 private:
  const WinogradArgs& a_;
  const int64_t k_;
  const Extent extent_;
  const Vec param_, bias_;
};

template <class Act, class Extent>
class GradientResult {
 public:
  FR_INLINE GradientResult(const WinogradArgs& a, const WinogradTask& t, int64_t k, Extent extent)
      : a_(a),
        t_(t),
        k_(k),
        extent_(extent),
        param_(a.out_act_param),
        scale_(load(a.out_scale + k, extent)),
        shift_(load(a.out_shift + k, extent)),
        mean_(load(a.out_mean + k, extent)) {}

  FR_INLINE void put(int64_t pixel, Vec value) {
    if (a_.residual.data) value = value + load(a_.residual.data + pixel * a_.residual.pitch + k_, extent_);
    const Vec x = load(a_.pending.data + pixel * a_.pending.pitch + k_, extent_);
    const Vec g = Act::gradient(fma(x, scale_, shift_), value, param_);
    store(a_.out + pixel * a_.out_pitch + k_, g, extent_);
    sum_ = sum_ + g;
    product_ = product_ + g * (x - mean_);
  }

  FR_INLINE void finish() const {
    if (!a_.sums) return;
    store(a_.sums + t_.block * a_.filters + k_, rounded(sum_), extent_);
    store(a_.sums + (a_.blocks + t_.block) * a_.filters + k_, rounded(product_), extent_);
  }

 private:
  const WinogradArgs& a_;
  const WinogradTask& t_;
  const int64_t k_;
  const Extent extent_;
  const Vec param_, scale_, shift_, mean_;
  Sum<float> sum_, product_;
};

// ---------------------------------------------------------------------------------------------------------------------
// From the definition
// ---------------------------------------------------------------------------------------------------------------------

// Nine taps of one vector of filters: as they are, or back from G w G^T.
template <bool kTaps>
FR_INLINE void load_taps(const float* weights, int64_t plane, Vec (&w)[9]) {
  if constexpr (kTaps) {
    for (int i = 0; i < 9; ++i) w[i] = load(weights + i * plane);
  } else {
    Vec rows[3][4];
    for (int s = 0; s < 4; ++s) {
      rows[0][s] = load(weights + s * plane);
      rows[1][s] = load(weights + (4 + s) * plane) - load(weights + (8 + s) * plane);
      rows[2][s] = load(weights + (12 + s) * plane);
    }
    for (int r = 0; r < 3; ++r) {
      w[r * 3] = rows[r][0];
      w[r * 3 + 1] = rows[r][1] - rows[r][2];
      w[r * 3 + 2] = rows[r][3];
    }
  }
}

template <bool kTaps, class Source>
void direct_sums(const WinogradArgs& a, const Source source, const Place& place, int64_t k, Vec (&results)[4]) {
  const float* weights = a.weights + k / kPanel * winograd_panel_size(a.channels) + k % kPanel;
  for_each_vector(a.channels, [&](int64_t c, auto extent) {
    float window[kPoints][Vec::kWidth];
    for (int64_t i = 0; i < kPoints; ++i)
      store(window[i], place.source[i] >= 0 ? source.at(place.source[i], c, extent) : Vec());
    for (int64_t lane = 0; lane < Vec::kWidth && c + lane < a.channels; ++lane) {
      Vec w[9];
      load_taps<kTaps>(weights + (c + lane) * kPanel, a.channels * kPanel, w);
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t at = (i / 2 + tap / 3) * 4 + i % 2 + tap % 3;
          // What lies outside takes no part: zero times infinity would be NaN.
          if (place.source[at] >= 0) results[i] = fma(Vec(window[at][lane]), w[tap], results[i]);
        }
    }
  });
}

// A tile's results for one vector of filters. Hardly ever called, and not to be inlined into what is.
__attribute__((noinline)) void direct_tile(const WinogradArgs& a, const Place& place, int64_t k, Vec (&results)[4]) {
  for (Vec& result : results) result = Vec();
  dispatch_source(a, [&](const auto source) {
    if (a.taps)
      direct_sums<true>(a, source, place, k, results);
    else
      direct_sums<false>(a, source, place, k, results);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Third step: A^T [..] A
// ---------------------------------------------------------------------------------------------------------------------

// Whether all four are finite; a sum that overflows says no as well, which costs time and nothing else.
FR_INLINE bool all_finite(const Vec (&results)[4]) {
  const Vec sum = (results[0] + results[1]) + (results[2] + results[3]);
  return !any_nan(sum - sum);
}

FR_INLINE void transform_products(const float* products, int64_t plane, Vec (&results)[4]) {
  Vec d[2][4];
  for (int s = 0; s < 4; ++s) {
    const Vec m0 = load(products + s * plane), m1 = load(products + (4 + s) * plane);
    const Vec m2 = load(products + (8 + s) * plane), m3 = load(products + (12 + s) * plane);
    d[0][s] = m0 + m1 + m2;
    d[1][s] = m1 - m2 - m3;
  }
  for (int r = 0; r < 2; ++r) {
    results[r * 2] = d[r][0] + d[r][1] + d[r][2];
    results[r * 2 + 1] = d[r][1] - d[r][2] - d[r][3];
  }
}

template <class Result>
void transform_results(const WinogradArgs& a, const WinogradTask& t, int64_t k, Result result) {
  const int64_t pitch = winograd_pitch(t.k_end - t.k_begin), plane = t.count * pitch;
  for (int64_t i = 0; i < t.count; ++i) {
    const Place place(a, t.first + i);
    Vec results[4];
    if (!a.taps) transform_products(t.products + i * pitch + k - t.k_begin, plane, results);
    if (a.taps || __builtin_expect(!all_finite(results), 0)) direct_tile(a, place, k, results);
    for (int j = 0; j < 4; ++j)
      if (place.result[j] >= 0) result.put(place.result[j], results[j]);
  }
  result.finish();
}

template <class Body>
FR_INLINE void for_each_filter_vector(const WinogradTask& t, Body body) {
  for_each_vector(t.k_end - t.k_begin, [&](int64_t k, auto extent) { body(t.k_begin + k, extent); });
}

void write_results(const WinogradArgs& a, const WinogradTask& t) {
  if (a.result == WinogradResult::kStatistics)
    return for_each_filter_vector(t, [&](int64_t k, auto extent) {
      transform_results(a, t, k, StatisticsResult<decltype(extent)>(a, t, k, extent));
    });
  dispatch_activation(a.out_act, [&](auto act) {
    using Act = decltype(act);
    if (a.result == WinogradResult::kGradient)
      return for_each_filter_vector(t, [&](int64_t k, auto extent) {
        transform_results(a, t, k, GradientResult<Act, decltype(extent)>(a, t, k, extent));
      });
    for_each_filter_vector(t, [&](int64_t k, auto extent) {
      using Extent = decltype(extent);
      if (a.residual.data)
        transform_results(a, t, k, JoinResult<Act, true, Extent>(a, t, k, extent));
      else
        transform_results(a, t, k, JoinResult<Act, false, Extent>(a, t, k, extent));
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights: G w G^T
// ---------------------------------------------------------------------------------------------------------------------

FR_INLINE void transform_taps(const Vec (&w)[9], Vec (&points)[kPoints]) {
  const Vec half(0.5f);
  Vec rows[4][3];
  for (int s = 0; s < 3; ++s) {
    const Vec ends = w[s] + w[6 + s];
    rows[0][s] = w[s];
    rows[1][s] = half * (ends + w[3 + s]);
    rows[2][s] = half * (ends - w[3 + s]);
    rows[3][s] = w[6 + s];
  }
  for (int r = 0; r < 4; ++r) {
    const Vec ends = rows[r][0] + rows[r][2];
    points[r * 4] = rows[r][0];
    points[r * 4 + 1] = half * (ends + rows[r][1]);
    points[r * 4 + 2] = half * (ends - rows[r][1]);
    points[r * 4 + 3] = rows[r][2];
  }
}

constexpr int64_t kPackedChannels = 16;  // taken together: as many as share a cache line in either layout

// The taps of some channels and of a panel of filters, as [tap][channel][kPanel]; zeros past the last filter. The loops
// follow memory: what lies a filter apart may all fall into one set of the cache.
void gather_taps(const WinogradPackArgs& a, int64_t panel, int64_t c, int64_t channels,
                 float (&taps)[9][kPackedChannels][kPanel]) {
  const int64_t left = a.filters - panel * kPanel, filters = left < kPanel ? left : kPanel;
  const float* from = a.data + panel * kPanel * a.filter + c * a.channel;
  const auto at = [&](int64_t k, int64_t i, int64_t tap) {
    return from[k * a.filter + i * a.channel + tap / 3 * a.row + tap % 3 * a.column];
  };
  if (a.filter == 1) {
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t tap = 0; tap < 9; ++tap)
        for (int64_t k = 0; k < kPanel; ++k) taps[tap][i][k] = k < filters ? at(k, i, tap) : 0.f;
  } else {
    for (int64_t k = 0; k < kPanel; ++k)
      for (int64_t tap = 0; tap < 9; ++tap)
        for (int64_t i = 0; i < channels; ++i) taps[tap][i][k] = k < filters ? at(k, i, tap) : 0.f;
  }
}

}  // namespace

bool winograd_pack(const WinogradPackArgs& args, int64_t begin, int64_t end) {
  const WinogradPackArgs a = args;
  const int64_t plane = a.channels * kPanel;
  Vec nothing;  // unless a tap is not finite
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t c = 0; c < a.channels; c += kPackedChannels) {
      float taps[9][kPackedChannels][kPanel];
      const int64_t left = a.channels - c, channels = left < kPackedChannels ? left : kPackedChannels;
      gather_taps(a, panel, c, channels, taps);
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t k = 0; k < kPanel; k += Vec::kWidth) {
          float* to = a.packed + panel * winograd_panel_size(a.channels) + (c + i) * kPanel + k;
          Vec w[9], points[kPoints];
          for (int64_t tap = 0; tap < 9; ++tap) {
            w[tap] = load(taps[tap][i] + k);
            nothing = fma(w[tap], Vec(0.f), nothing);
          }
          if (!a.taps) transform_taps(w, points);
          for (int64_t point = 0; point < (a.taps ? 9 : kPoints); ++point)
            store(to + point * plane, a.taps ? w[point] : points[point]);
        }
    }
  return !any_nan(nothing);
}

void winograd_task(const WinogradArgs& args, const WinogradTask& task) {
  if (!args.taps) {
    dispatch_source(args, [&](const auto source) {
      transform_source(args, source, task.first, task.count, 0, args.channels, task.window);
    });
    multiply(args, task);
  }
  write_results(args, task);
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
