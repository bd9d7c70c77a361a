#include "cpu/dispatch.h"
#include "cpu/rk_combine.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// start + sum_i weights[i] stages[i] at element `at`.
template <class T, class Args, class Extent>
FR_INLINE Vec weighted_sum(const Args& a, Vec start, int64_t at, Extent extent) {
  for (int64_t stage = 0; stage < a.count; ++stage)
    start = fma(load(static_cast<const T*>(a.stages[stage]) + at, extent), Vec(a.weights[stage]), start);
  return start;
}

FR_INLINE Vec magnitude(Vec a) { return vmax(a, Vec(0.f) - a); }

// Adds the square of a ratio, in those lanes that the extent covers: past its end tolerances may be zero.
FR_INLINE Vec add_square(Vec sum, Vec ratio, Whole) { return fma(ratio, ratio, sum); }
FR_INLINE Vec add_square(Vec sum, Vec ratio, Tail tail) {
  float lanes[Vec::kWidth] = {};
  store(lanes, ratio * ratio, tail.n);
  return sum + load(lanes);
}

// At most kVectors squares meet in a float; beyond that the sum is in double.
template <class T>
double error_sum(const RkErrorArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kVectors = 32;
  double total = 0;
  for (int64_t at = begin; at < end; at += kVectors * Vec::kWidth) {
    const int64_t n = end - at < kVectors * Vec::kWidth ? end - at : kVectors * Vec::kWidth;
    const T *y0 = static_cast<const T*>(a.y0) + at, *y1 = static_cast<const T*>(a.y1) + at;
    Vec sum;
    for_each_vector(n, [&](int64_t i, auto extent) {
      const Vec error = weighted_sum<T>(a, Vec(), at + i, extent);
      const Vec size = vmax(magnitude(load(y0 + i, extent)), magnitude(load(y1 + i, extent)));
      sum = add_square(sum, error / fma(Vec(a.rtol), size, Vec(a.atol)), extent);
    });
    total += static_cast<double>(horizontal_sum(sum));
  }
  return total;
}

}  // namespace

void rk_combine_range(const RkCombineArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_vector(end - begin, [&](int64_t i, auto extent) {
      const int64_t at = begin + i;
      const Vec y = load(static_cast<const T*>(a.y) + at, extent);
      store(static_cast<T*>(a.out) + at, weighted_sum<T>(a, y, at, extent), extent);
    });
  });
}

void rk_combine_backward_range(const RkCombineBackwardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_vector(end - begin, [&](int64_t i, auto extent) {
      const int64_t at = begin + i;
      const Vec grad = load(static_cast<const T*>(a.grad) + at, extent);
      for (int64_t stage = 0; stage < a.count; ++stage)
        store(static_cast<T*>(a.outs[stage]) + at, grad * Vec(a.weights[stage]), extent);
    });
  });
}

void rk_error_range(const RkErrorArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kErrorPiece, rest = a.numel - first;
      a.partials[piece] = error_sum<T>(a, first, rest < kErrorPiece ? a.numel : first + kErrorPiece);
    }
  });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
