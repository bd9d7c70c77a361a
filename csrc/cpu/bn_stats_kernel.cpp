#include "cpu/bn_stats.h"
#include "cpu/dispatch.h"
#include "cpu/moments.h"
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

// Two passes, of which the second reads cache. Floats are summed in double: a mean near zero is then as accurate as one
// that is not.
// What is read, and where it is copied to on the way, unless there is nowhere.
template <class T, bool kCopies>
struct Source {
  const T* x;
  T* into;
  int64_t x_pitch, into_pitch;
  FR_INLINE Source from(int64_t i) const { return {x + i, kCopies ? into + i : into, x_pitch, into_pitch}; }
  template <class Extent>
  FR_INLINE void copy(int64_t row, int64_t i, Extent extent) const {
    if constexpr (kCopies) fusedres::FUSEDRES_ISA::copy(into + row * into_pitch + i, x + row * x_pitch + i, extent);
  }
};

// Statistics of kVectors * kWidth neighbouring channels over `rows` pixels.
template <class T, bool kCopies, int kVectors, class Extent>
FR_INLINE void stats_of_columns(const Source<T, kCopies>& source, int64_t rows, const StatsPartials& out,
                                Extent extent) {
  const T* x = source.x;
  const int64_t pitch = source.x_pitch;
  Sum<T> sum[kVectors];
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kVectors; ++k) sum[k] = sum[k] + load(x + row * pitch + k * Vec::kWidth, extent);
  Vec mean[kVectors], correction[kVectors], square[kVectors];
  for (int k = 0; k < kVectors; ++k) split_mean(sum[k], rows, mean[k], correction[k]);
  for (int64_t row = 0; row < rows;) {
    const int64_t stop = rows - row < kRun ? rows : row + kRun;
    Vec run_square[kVectors];
    for (; row < stop; ++row)
      for (int k = 0; k < kVectors; ++k) {
        const Vec d = load(x + row * pitch + k * Vec::kWidth, extent) - mean[k];
        run_square[k] = fma(d, d, run_square[k]);
        source.copy(row, k * Vec::kWidth, extent);
      }
    for (int k = 0; k < kVectors; ++k) square[k] = square[k] + run_square[k];
  }
  const Vec count(static_cast<float>(rows));
  for (int k = 0; k < kVectors; ++k) {
    store(out.mean + k * Vec::kWidth, mean[k], extent);
    store(out.correction + k * Vec::kWidth, correction[k], extent);
    store(out.m2 + k * Vec::kWidth, square[k] - count * correction[k] * correction[k], extent);
  }
}

template <class T, bool kCopies>
void stats_channels_last(const StatsArgs& a, int64_t begin, int64_t end) {
  constexpr int kVectors = 4;
  const int64_t c = a.channels;
  for (int64_t part = begin; part < end; ++part) {
    const Piece piece = piece_at(a.pieces, part);
    const int64_t pixel = piece.run * a.pieces.length + piece.offset;
    T* into = kCopies ? static_cast<T*>(a.into) + pixel * a.into_pitch : nullptr;
    const Source<T, kCopies> source{static_cast<const T*>(a.x) + pixel * a.x_pitch, into, a.x_pitch, a.into_pitch};
    const StatsPartials out = at(a.partials, part * c);
    int64_t i = 0;
    for (; i + kVectors * Vec::kWidth <= c; i += kVectors * Vec::kWidth)
      stats_of_columns<T, kCopies, kVectors>(source.from(i), piece.size, at(out, i), Whole{});
    for_each_vector(c - i, [&](int64_t j, auto extent) {
      stats_of_columns<T, kCopies, 1>(source.from(i + j), piece.size, at(out, i + j), extent);
    });
  }
}

// Statistics of one channel over `n` neighbouring elements.
template <class T, bool kCopies>
FR_INLINE void stats_of_stretch(const Source<T, kCopies>& source, int64_t n, const StatsPartials& out) {
  const T* x = source.x;
  Sum<T> sum;
  for_each_vector(n, [&](int64_t i, auto extent) {
    sum = sum + load(x + i, extent);
    source.copy(0, i, extent);
  });
  const double exact = horizontal_sum(sum) / static_cast<double>(n);
  const float mean = static_cast<float>(exact), correction = static_cast<float>(exact - mean);
  const int64_t whole = n - n % Vec::kWidth;
  Vec square;
  for (int64_t i = 0; i < whole;) {
    const int64_t stop = whole - i < kRun * Vec::kWidth ? whole : i + kRun * Vec::kWidth;
    Vec run_square;
    for (; i < stop; i += Vec::kWidth) {
      const Vec d = load(x + i) - Vec(mean);
      run_square = fma(d, d, run_square);
    }
    square = square + run_square;
  }
  // In double: each of these few would be rounded to the whole sum, which the vectors' lanes share.
  double m2 = horizontal_sum(square);
  for (int64_t i = whole; i < n; ++i) {
    const double d = to_float(x[i]) - mean;
    m2 += d * d;
  }
  *out.mean = mean;
  *out.correction = correction;
  *out.m2 = static_cast<float>(m2 - static_cast<double>(n) * correction * correction);
}

template <class T, bool kCopies>
void stats_contiguous(const StatsArgs& a, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const Piece piece = piece_at(a.pieces, part);
    for (int64_t channel = 0; channel < a.channels; ++channel) {
      const int64_t first = (piece.run * a.channels + channel) * a.pieces.length + piece.offset;
      T* into = kCopies ? static_cast<T*>(a.into) + first : nullptr;
      const Source<T, kCopies> source{static_cast<const T*>(a.x) + first, into, 0, 0};
      stats_of_stretch(source, piece.size, at(a.partials, part * a.channels + channel));
    }
  }
}

template <class T, bool kCopies>
void stats(const StatsArgs& a, int64_t begin, int64_t end) {
  if (a.channels_last)
    stats_channels_last<T, kCopies>(a, begin, end);
  else
    stats_contiguous<T, kCopies>(a, begin, end);
}

}  // namespace

void stats_range(const StatsArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.into)
      stats<T, true>(args, begin, end);
    else
      stats<T, false>(args, begin, end);
  });
}

// Chan's merge of a group's partials at once: mean = sum n_p mean_p / n, M2 = sum M2_p + n_p (mean_p - mean)^2.
void stats_merge_range(const StatsMergeArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  int64_t width = 0;
  for (int64_t column = begin; column < end; column += width) {
    const int64_t group = column / a.channels, c = column % a.channels;
    width = end - column < a.channels - c ? end - column : a.channels - c;
    width = width < kBlock ? width : kBlock;
    const StatsPartials first = at(a.partials, group * a.parts * a.channels + c);
    double count = 0, mean[kBlock] = {}, m2[kBlock] = {};
    for (int64_t part = 0; part < a.parts; ++part) {
      const StatsPartials p = at(first, part * a.channels);
      count += a.counts[part];
      for (int64_t i = 0; i < width; ++i) mean[i] += a.counts[part] * mean_of(p, i);
    }
    for (int64_t i = 0; i < width; ++i) mean[i] /= count;
    for (int64_t part = 0; part < a.parts; ++part) {
      const StatsPartials p = at(first, part * a.channels);
      for (int64_t i = 0; i < width; ++i) {
        const double d = mean_of(p, i) - mean[i];
        m2[i] += static_cast<double>(p.m2[i]) + a.counts[part] * d * d;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      a.out[column + i] = static_cast<float>(mean[i]);
      a.out[a.groups * a.channels + column + i] = static_cast<float>(m2[i] < 0 ? 0 : m2[i]);
    }
  }
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
