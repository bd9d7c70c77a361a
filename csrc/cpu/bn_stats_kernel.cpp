#include "cpu/bn_stats.h"
#include "cpu/dispatch.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// The mean and M2 of kVectors * kWidth neighbouring channels over `rows` pixels, in two passes: the second reads cache.
template <class T, int kVectors, class Extent>
FR_INLINE void stats_of_columns(const T* x, int64_t rows, int64_t stride, float* mean, float* m2, Extent extent) {
  Vec sum[kVectors], square[kVectors];
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kVectors; ++k) sum[k] = sum[k] + load(x + row * stride + k * Vec::kWidth, extent);
  const Vec share(1.f / static_cast<float>(rows));
  for (Vec& s : sum) s = s * share;
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kVectors; ++k) {
      const Vec d = load(x + row * stride + k * Vec::kWidth, extent) - sum[k];
      square[k] = fma(d, d, square[k]);
    }
  for (int k = 0; k < kVectors; ++k) {
    store(mean + k * Vec::kWidth, sum[k], extent);
    store(m2 + k * Vec::kWidth, square[k], extent);
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
    float *mean = a.mean + part * c, *m2 = a.m2 + part * c;
    int64_t i = 0;
    for (; i + kVectors * Vec::kWidth <= c; i += kVectors * Vec::kWidth)
      stats_of_columns<T, kVectors>(x + i, rows, c, mean + i, m2 + i, Whole{});
    for_each_vector(c - i, [&](int64_t j, auto extent) {
      stats_of_columns<T, 1>(x + i + j, rows, c, mean + i + j, m2 + i + j, extent);
    });
  }
}

template <class T>
void stats_contiguous(const StatsArgs& a, int64_t begin, int64_t end) {
  const int64_t pieces = (a.plane + kStatsPlane - 1) / kStatsPlane;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t sample = part / pieces, offset = part % pieces * kStatsPlane;
    const int64_t n = a.plane - offset < kStatsPlane ? a.plane - offset : kStatsPlane;
    for (int64_t channel = 0; channel < a.channels; ++channel) {
      const T* x = static_cast<const T*>(a.x) + (sample * a.channels + channel) * a.plane + offset;
      Vec sum, square;
      for_each_vector(n, [&](int64_t i, auto extent) { sum = sum + load(x + i, extent); });
      const float mean = horizontal_sum(sum) / static_cast<float>(n);
      const int64_t whole = n - n % Vec::kWidth;
      for_each_vector(whole, [&](int64_t i, auto extent) {
        const Vec d = load(x + i, extent) - Vec(mean);
        square = fma(d, d, square);
      });
      float m2 = horizontal_sum(square);
      for (int64_t i = whole; i < n; ++i) m2 += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
      a.mean[part * a.channels + channel] = mean;
      a.m2[part * a.channels + channel] = m2;
    }
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
      const double n = a.counts[part];
      count += n;
      for (int64_t i = 0; i < width; ++i) mean[i] += n * static_cast<double>(a.mean[part * a.channels + c + i]);
    }
    for (int64_t i = 0; i < width; ++i) mean[i] /= count;
    for (int64_t part = 0; part < a.parts; ++part) {
      const double n = a.counts[part];
      for (int64_t i = 0; i < width; ++i) {
        const double d = static_cast<double>(a.mean[part * a.channels + c + i]) - mean[i];
        m2[i] += static_cast<double>(a.m2[part * a.channels + c + i]) + n * d * d;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      a.out[c + i] = static_cast<float>(mean[i]);
      a.out[a.channels + c + i] = static_cast<float>(m2[i]);
    }
  }
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
