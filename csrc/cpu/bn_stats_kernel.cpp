#include "cpu/bn_stats.h"
#include "cpu/dispatch.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

FR_INLINE StatsPartials at(const StatsPartials& p, int64_t i) { return {p.mean + i, p.correction + i, p.m2 + i}; }

// An infinite mean has no deviations to correct it by.
FR_INLINE double mean_of(const StatsPartials& p, int64_t i) {
  const double mean = p.mean[i];
  return mean - mean == 0 ? mean + p.correction[i] : mean;
}

// Two passes, of which the second reads cache. The first mean m is of limited accuracy, so for floats the second pass
// takes the deviations' own mean too: mean = m + sum d / n and M2 = sum d^2 - (sum d)^2 / n, with d = x - m. A large
// mean then costs a small variance nothing. m and sum d / n are kept apart, since their sum does not fit a float. The
// sums of narrower types are as good as exact, and their steps far above m's rounding.
template <class T>
constexpr bool kCorrects = sizeof(T) == sizeof(float);

// Statistics of kVectors * kWidth neighbouring channels over `rows` pixels.
template <class T, int kVectors, class Extent>
FR_INLINE void stats_of_columns(const T* x, int64_t rows, int64_t stride, const StatsPartials& out, Extent extent) {
  Vec mean[kVectors], sum[kVectors], square[kVectors];
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kVectors; ++k) mean[k] = mean[k] + load(x + row * stride + k * Vec::kWidth, extent);
  const Vec share(1.f / static_cast<float>(rows));
  for (Vec& m : mean) m = m * share;
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kVectors; ++k) {
      const Vec d = load(x + row * stride + k * Vec::kWidth, extent) - mean[k];
      if constexpr (kCorrects<T>) sum[k] = sum[k] + d;
      square[k] = fma(d, d, square[k]);
    }
  for (int k = 0; k < kVectors; ++k) {
    const Vec correction = sum[k] * share;
    store(out.mean + k * Vec::kWidth, mean[k], extent);
    store(out.correction + k * Vec::kWidth, correction, extent);
    store(out.m2 + k * Vec::kWidth, square[k] - sum[k] * correction, extent);
  }
}

template <class T>
void stats_channels_last(const StatsArgs& a, int64_t begin, int64_t end) {
  constexpr int kVectors = 4;
  const int64_t c = a.channels;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first_row = part * kStatsRows;
    const int64_t rows = a.pixels - first_row < kStatsRows ? a.pixels - first_row : kStatsRows;
    const T* x = static_cast<const T*>(a.x) + first_row * c;
    const StatsPartials out = at(a.partials, part * c);
    int64_t i = 0;
    for (; i + kVectors * Vec::kWidth <= c; i += kVectors * Vec::kWidth)
      stats_of_columns<T, kVectors>(x + i, rows, c, at(out, i), Whole{});
    for_each_vector(
        c - i, [&](int64_t j, auto extent) { stats_of_columns<T, 1>(x + i + j, rows, c, at(out, i + j), extent); });
  }
}

// Statistics of one channel over `n` neighbouring elements.
template <class T>
FR_INLINE void stats_of_stretch(const T* x, int64_t n, const StatsPartials& out) {
  Vec sum, square;
  for_each_vector(n, [&](int64_t i, auto extent) { sum = sum + load(x + i, extent); });
  const float mean = horizontal_sum(sum) / static_cast<float>(n);
  const int64_t whole = n - n % Vec::kWidth;
  sum = Vec();
  for_each_vector(whole, [&](int64_t i, auto extent) {
    const Vec d = load(x + i, extent) - Vec(mean);
    if constexpr (kCorrects<T>) sum = sum + d;
    square = fma(d, d, square);
  });
  float total = horizontal_sum(sum), m2 = horizontal_sum(square);
  for (int64_t i = whole; i < n; ++i) {
    const float d = to_float(x[i]) - mean;
    if constexpr (kCorrects<T>) total += d;
    m2 += d * d;
  }
  *out.mean = mean;
  *out.correction = total / static_cast<float>(n);
  *out.m2 = m2 - total * *out.correction;
}

template <class T>
void stats_contiguous(const StatsArgs& a, int64_t begin, int64_t end) {
  const int64_t pieces = (a.plane + kStatsPlane - 1) / kStatsPlane;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t sample = part / pieces, offset = part % pieces * kStatsPlane;
    const int64_t n = a.plane - offset < kStatsPlane ? a.plane - offset : kStatsPlane;
    for (int64_t channel = 0; channel < a.channels; ++channel)
      stats_of_stretch(static_cast<const T*>(a.x) + (sample * a.channels + channel) * a.plane + offset, n,
                       at(a.partials, part * a.channels + channel));
  }
}

}  // namespace

void stats_range(const StatsArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.channels_last)
      stats_channels_last<T>(args, begin, end);
    else
      stats_contiguous<T>(args, begin, end);
  });
}

// Chan's merge of all partials at once: mean = sum n_p mean_p / n, M2 = sum M2_p + n_p (mean_p - mean)^2.
void stats_merge_range(const StatsMergeArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t width = end - c < kBlock ? end - c : kBlock;
    double count = 0, mean[kBlock] = {}, m2[kBlock] = {};
    for (int64_t part = 0; part < a.parts; ++part) {
      const StatsPartials p = at(a.partials, part * a.channels + c);
      count += a.counts[part];
      for (int64_t i = 0; i < width; ++i) mean[i] += a.counts[part] * mean_of(p, i);
    }
    for (int64_t i = 0; i < width; ++i) mean[i] /= count;
    for (int64_t part = 0; part < a.parts; ++part) {
      const StatsPartials p = at(a.partials, part * a.channels + c);
      for (int64_t i = 0; i < width; ++i) {
        const double d = mean_of(p, i) - mean[i];
        m2[i] += static_cast<double>(p.m2[i]) + a.counts[part] * d * d;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      a.out[c + i] = static_cast<float>(mean[i]);
      a.out[a.channels + c + i] = static_cast<float>(m2[i] < 0 ? 0 : m2[i]);
    }
  }
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
