#include "cpu/dispatch.h"
#include "cpu/join_pool.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// Positions [begin, end) along one dimension.
struct Range {
  int64_t begin, end;
};

FR_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Positions of the image in window number `at`.
FR_INLINE Range window(const PoolShape& s, int d, int64_t at) {
  const int64_t from = at * s.stride[d] - s.padding[d];
  return {from < 0 ? 0 : from, least(from + s.kernel[d], s.size[d])};
}

// Windows that a position of the image is in.
FR_INLINE Range windows(const PoolShape& s, int d, int64_t position) {
  const int64_t last = position + s.padding[d], before = last - s.kernel[d];
  return {before < 0 ? 0 : before / s.stride[d] + 1, least(last / s.stride[d] + 1, s.pooled[d])};
}

// The number, in window number `at`, of a position along one dimension.
FR_INLINE int64_t number(const PoolShape& s, int d, int64_t at, int64_t position) {
  return position - (at * s.stride[d] - s.padding[d]);
}

// ---------------------------------------------------------------------------------------------------------------------
// channels_last: vectors of channels
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kVectors = 4;  // at once: each comparison waits for the one before it

// Calls strip(first channel, Constant<vectors>, extent) for all channels.
template <class Strip>
FR_INLINE void for_each_strip(int64_t channels, Strip strip) {
  int64_t i = 0;
  for (; i + kVectors * Vec::kWidth <= channels; i += kVectors * Vec::kWidth) strip(i, Constant<kVectors>{}, Whole{});
  for_each_vector(channels - i, [&](int64_t j, auto extent) { strip(i + j, Constant<1>{}, extent); });
}

// The result of one window: `from` is its first position in the image, number `first` of it, `to` where the result
// goes.
template <bool kRecord, int kCount, class T, class Extent>
FR_INLINE void pool(const JoinPoolArgs& a, Range rows, Range columns, const T* from, int64_t first, int64_t to,
                    Extent extent) {
  Vec best[kCount], taken[kCount];
  for (int k = 0; k < kCount; ++k) {
    best[k] = Vec(-__builtin_inff());
    taken[k] = Vec(static_cast<float>(first));
  }
  for (int64_t h = rows.begin; h < rows.end; ++h, from += a.shape.size[1] * a.pitch, first += a.shape.kernel[1]) {
    const T* at = from;
    for (int64_t w = 0; w < columns.end - columns.begin; ++w, at += a.pitch) {
      const Vec number(static_cast<float>(first + w));
      for (int k = 0; k < kCount; ++k) {
        const Vec value = load(at + k * Vec::kWidth, extent);
        if constexpr (kRecord) taken[k] = select_gt_or_nan(value, best[k], number, taken[k]);
        best[k] = select_gt_or_nan(value, best[k], value, best[k]);
      }
    }
  }
  for (int k = 0; k < kCount; ++k) {
    store(static_cast<T*>(a.out) + to + k * Vec::kWidth, best[k], extent);
    if constexpr (kRecord) store(a.taken + to + k * Vec::kWidth, taken[k], extent);
  }
}

// The arguments are a copy: what a reference refers to might change with every store, and would be read as often.
template <class T, bool kRecord>
void pool_pixels(const JoinPoolArgs a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  for (int64_t row = begin; row < end; ++row) {
    const Range rows = window(s, 0, row);
    for (int64_t column = 0; column < s.pooled[1]; ++column) {
      const Range columns = window(s, 1, column);
      const T* from = static_cast<const T*>(a.value) + (rows.begin * s.size[1] + columns.begin) * a.pitch;
      const int64_t first = number(s, 0, row, rows.begin) * s.kernel[1] + number(s, 1, column, columns.begin);
      const int64_t to = (row * s.pooled[1] + column) * a.channels;
      for_each_strip(a.channels, [&](int64_t i, auto count, auto extent) {
        pool<kRecord, decltype(count)::value>(a, rows, columns, from + i, first, to + i, extent);
      });
    }
  }
}

template <class T>
void backward_pixels(const JoinPoolBackwardArgs a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  for (int64_t h = begin; h < end; ++h) {
    const Range rows = windows(s, 0, h);
    for (int64_t w = 0; w < s.size[1]; ++w) {
      const Range columns = windows(s, 1, w);
      T* out = static_cast<T*>(a.out) + (h * s.size[1] + w) * a.channels;
      for_each_strip(a.channels, [&](int64_t i, auto count, auto extent) {
        constexpr int kCount = decltype(count)::value;
        Vec sum[kCount];
        for (int64_t row = rows.begin; row < rows.end; ++row)
          for (int64_t column = columns.begin; column < columns.end; ++column) {
            const int64_t at = (row * s.pooled[1] + column) * a.channels + i;
            const Vec mine(static_cast<float>(number(s, 0, row, h) * s.kernel[1] + number(s, 1, column, w)));
            for (int k = 0; k < kCount; ++k) {
              const Vec grad = load(static_cast<const T*>(a.grad) + at + k * Vec::kWidth, extent);
              sum[k] = sum[k] + select_eq(load(a.taken + at + k * Vec::kWidth, extent), mine, grad, Vec());
            }
          }
        for (int k = 0; k < kCount; ++k) store(out + i + k * Vec::kWidth, sum[k], extent);
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Contiguous: rows of windows
// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kColumns = 128;  // at once

FR_INLINE int64_t ceiling(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

// Windows [begin, end) of a row: each of their positions in turn, for all of them.
template <class T, bool kRecord>
FR_INLINE void pool_columns(const JoinPoolArgs& a, int64_t row, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const Range rows = window(s, 0, row);
  float best[kColumns];
  int32_t taken[kColumns];
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t first = number(s, 0, row, rows.begin) * s.kernel[1];
    best[i] = -__builtin_inff();
    taken[i] = static_cast<int32_t>(first + number(s, 1, begin + i, window(s, 1, begin + i).begin));
  }
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t t = 0; t < s.kernel[1]; ++t) {
      const int64_t from = ceiling(s.padding[1] - t, s.stride[1]),
                    to = ceiling(s.size[1] + s.padding[1] - t, s.stride[1]);
      const int64_t first = from < begin ? begin : from, stop = to < end ? to : end, step = s.stride[1];
      const T* value = static_cast<const T*>(a.value) + h * s.size[1] + t - s.padding[1] + first * step;
      const auto mine = static_cast<int32_t>(number(s, 0, row, h) * s.kernel[1] + t);
      for (int64_t i = 0; i < stop - first; ++i) {
        const float v = to_float(value[i * step]), before = best[first - begin + i];
        const bool takes = (v > before) | (v != v);
        best[first - begin + i] = takes ? v : before;
        taken[first - begin + i] = takes ? mine : taken[first - begin + i];
      }
    }
  const int64_t to = row * s.pooled[1] + begin;
  for (int64_t i = 0; i < end - begin; ++i) {
    static_cast<T*>(a.out)[to + i] = from_float<T>(best[i]);
    if constexpr (kRecord) a.taken[to + i] = static_cast<uint8_t>(taken[i]);
  }
}

template <class T, bool kRecord>
void pool_plane(const JoinPoolArgs a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < a.shape.pooled[1]; column += kColumns)
      pool_columns<T, kRecord>(a, row, column, least(column + kColumns, a.shape.pooled[1]));
}

// Adds every gradient up where it goes, which is faster here than to look at the windows of each position.
template <class T>
void backward_plane(const JoinPoolBackwardArgs a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t width = s.size[1];
  const auto* grad = static_cast<const T*>(a.grad);
  for (int64_t i = 0; i < (end - begin) * width; ++i) a.sums[i] = 0.f;
  for (int64_t row = windows(s, 0, begin).begin; row < windows(s, 0, end - 1).end; ++row)
    for (int64_t column = 0; column < s.pooled[1]; ++column) {
      const int64_t at = row * s.pooled[1] + column, taken = a.taken[at];
      const int64_t h = row * s.stride[0] - s.padding[0] + taken / s.kernel[1];
      const int64_t w = column * s.stride[1] - s.padding[1] + taken % s.kernel[1];
      if (begin <= h && h < end) a.sums[(h - begin) * width + w] += to_float(grad[at]);
    }
  T* out = static_cast<T*>(a.out) + begin * width;
  for_each_vector((end - begin) * width,
                  [&](int64_t i, auto extent) { store(out + i, load(a.sums + i, extent), extent); });
}

template <class T, bool kRecord>
void pool_rows(const JoinPoolArgs& a, int64_t begin, int64_t end) {
  a.channels_last ? pool_pixels<T, kRecord>(a, begin, end) : pool_plane<T, kRecord>(a, begin, end);
}

}  // namespace

void join_pool_rows(const JoinPoolArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.taken ? pool_rows<T, true>(args, begin, end) : pool_rows<T, false>(args, begin, end);
  });
}

void join_pool_backward_rows(const JoinPoolBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.channels_last ? backward_pixels<T>(args, begin, end) : backward_plane<T>(args, begin, end);
  });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
