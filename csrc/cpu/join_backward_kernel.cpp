#include "common/activations.h"
#include "cpu/dispatch.h"
#include "cpu/join_backward.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// The forward's argument of the activation, and the gradient that reaches it, recomputed for one vector.
template <class T, class Act, Residual kKind, bool kPerLane>
struct Recompute {
  Vec param;
  Parameter<kPerLane> scale, shift;
  Addend<kKind, kPerLane> add;

  FR_INLINE Recompute(const JoinBackwardArgs& a, int64_t channel)
      : param(a.act_param),
        scale{a.scale + channel},
        shift{a.shift + channel},
        add{{a.res_scale + channel}, {a.res_shift + channel}} {}

  template <class Extent>
  FR_INLINE Vec argument(Vec y, Vec residual, int64_t i, Extent extent) const {
    return add(fma(y, scale.at(i, extent), shift.at(i, extent)), residual, i, extent);
  }
};

// Sums over `rows` rows of kVectors vectors each. Rows are pixels (channels_last) or stretches of a plane (contiguous).
template <class T, class Act, Residual kKind, bool kPerLane, int kVectors, class Extent>
FR_INLINE void reduce_tile(const JoinReduceArgs& a, int64_t channel, int64_t at, int64_t rows, int64_t stride,
                           Extent extent, Vec (&sums)[kReduceSums][kVectors]) {
  const Recompute<T, Act, kKind, kPerLane> recompute(a, channel);
  const Parameter<kPerLane> mean{a.mean + channel}, res_mean{a.res_mean + channel};
  const T *grad = static_cast<const T*>(a.grad) + at, *y = static_cast<const T*>(a.y) + at;
  const T* r = static_cast<const T*>(a.residual) + at;
  T* emit = a.emit ? static_cast<T*>(a.emit) + at : nullptr;
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kVectors; ++k) {
      const int64_t lane = k * Vec::kWidth, i = row * stride + lane;
      const Vec value = load(y + i, extent);
      const Vec residual = kKind == Residual::kNone ? Vec() : load(r + i, extent);
      const Vec z = recompute.argument(value, residual, lane, extent);
      const Vec g = Act::gradient(z, load(grad + i, extent), recompute.param);
      sums[0][k] = sums[0][k] + g;
      sums[1][k] = fma(g, value - mean.at(lane, extent), sums[1][k]);
      if constexpr (kKind == Residual::kAffine) sums[2][k] = fma(g, residual - res_mean.at(lane, extent), sums[2][k]);
      if (emit) store(emit + i, Act::forward(z, recompute.param), extent);
    }
}

template <class T, class Act, Residual kKind>
void reduce_channels_last(const JoinReduceArgs& a, int64_t begin, int64_t end) {
  constexpr int kVectors = 4;
  const int64_t c = a.channels;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first_row = part * kReduceRows;
    const int64_t rows = a.pixels - first_row < kReduceRows ? a.pixels - first_row : kReduceRows;
    const auto strip = [&](int64_t channel, auto vectors, auto extent) {
      constexpr int kStrip = decltype(vectors)::value;
      Vec sums[kReduceSums][kStrip];
      reduce_tile<T, Act, kKind, true, kStrip>(a, channel, first_row * c + channel, rows, c, extent, sums);
      for (int s = 0; s < kReduceSums; ++s)
        for (int k = 0; k < kStrip; ++k)
          store(a.sums + (s * a.parts + part) * c + channel + k * Vec::kWidth, sums[s][k], extent);
    };
    int64_t i = 0;
    for (; i + kVectors * Vec::kWidth <= c; i += kVectors * Vec::kWidth) strip(i, Constant<kVectors>{}, Whole{});
    for_each_vector(c - i, [&](int64_t j, auto extent) { strip(i + j, Constant<1>{}, extent); });
  }
}

template <class T, class Act, Residual kKind>
void reduce_contiguous(const JoinReduceArgs& a, int64_t begin, int64_t end) {
  const int64_t pieces = (a.plane + kReducePlane - 1) / kReducePlane;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t sample = part / pieces, offset = part % pieces * kReducePlane;
    const int64_t n = a.plane - offset < kReducePlane ? a.plane - offset : kReducePlane;
    const int64_t rows = n / Vec::kWidth, rest = n % Vec::kWidth;
    for (int64_t channel = 0; channel < a.channels; ++channel) {
      const int64_t at = (sample * a.channels + channel) * a.plane + offset;
      Vec sums[kReduceSums][1];
      reduce_tile<T, Act, kKind, false, 1>(a, channel, at, rows, Vec::kWidth, Whole{}, sums);
      if (rest)  // lanes past the end load a gradient of zero
        reduce_tile<T, Act, kKind, false, 1>(a, channel, at + rows * Vec::kWidth, 1, 0, Tail{rest}, sums);
      for (int s = 0; s < kReduceSums; ++s)
        a.sums[(s * a.parts + part) * a.channels + channel] = horizontal_sum(sums[s][0]);
    }
  }
}

template <class T, class Act, Residual kKind, bool kPerLane>
void apply_spans(const JoinApplyArgs& a, int64_t begin, int64_t end) {
  for (int64_t span = begin; span < end; ++span) {
    const int64_t channel = kPerLane ? 0 : span % a.channels;
    const Recompute<T, Act, kKind, kPerLane> recompute(a, channel);
    const Parameter<kPerLane> mean{a.mean + channel}, slope{a.slope + channel}, offset{a.offset + channel};
    const Parameter<kPerLane> res_mean{a.res_mean + channel}, res_scale{a.res_scale + channel};
    const Parameter<kPerLane> res_slope{a.res_slope + channel}, res_offset{a.res_offset + channel};
    const int64_t at = span * a.inner;
    const T *grad = static_cast<const T*>(a.grad) + at, *y = static_cast<const T*>(a.y) + at;
    const T* r = static_cast<const T*>(a.residual) + at;
    T* grad_y = static_cast<T*>(a.grad_y) + at;
    T* grad_r = a.grad_residual ? static_cast<T*>(a.grad_residual) + at : nullptr;
    for_each_vector(a.inner, [&](int64_t i, auto extent) {
      const Vec value = load(y + i, extent);
      const Vec residual = kKind == Residual::kNone ? Vec() : load(r + i, extent);
      const Vec z = recompute.argument(value, residual, i, extent);
      const Vec g = Act::gradient(z, load(grad + i, extent), recompute.param);
      // Without batch statistics the value takes no part, not even where it is NaN.
      Vec through_stats, side;
      if (a.training) through_stats = fma(slope.at(i, extent), value - mean.at(i, extent), offset.at(i, extent));
      store(grad_y + i, fma(recompute.scale.at(i, extent), g, through_stats), extent);
      if constexpr (kKind == Residual::kPlain) {
        if (grad_r) store(grad_r + i, g, extent);
      }
      if constexpr (kKind == Residual::kAffine) {
        if (a.res_training)
          side = fma(res_slope.at(i, extent), residual - res_mean.at(i, extent), res_offset.at(i, extent));
        if (grad_r) store(grad_r + i, fma(res_scale.at(i, extent), g, side), extent);
      }
    });
  }
}

template <class Body>
FR_INLINE void dispatch(const JoinBackwardArgs& a, Body body) {
  dispatch_dtype(a.dtype, [&](auto element) {
    dispatch_residual(a.kind,
                      [&](auto kind) { dispatch_activation(a.act, [&](auto act) { body(element, act, kind); }); });
  });
}

}  // namespace

void join_reduce_range(const JoinReduceArgs& args, int64_t begin, int64_t end) {
  dispatch(args, [&](auto element, auto act, auto kind) {
    using T = decltype(element);
    using Act = decltype(act);
    if (args.channels_last)
      reduce_channels_last<T, Act, decltype(kind)::value>(args, begin, end);
    else
      reduce_contiguous<T, Act, decltype(kind)::value>(args, begin, end);
  });
}

void join_reduce_merge_range(const JoinReduceMergeArgs& a, int64_t begin, int64_t end) {
  for (int s = 0; s < kReduceSums; ++s)
    for (int64_t c = begin; c < end; ++c) {
      double total = 0;
      for (int64_t part = 0; part < a.parts; ++part)
        total += static_cast<double>(a.sums[(s * a.parts + part) * a.channels + c]);
      const double scale = s == 0 ? 1.0 : s == 1 ? a.rstd[c] : a.res_rstd[c];
      a.out[s * a.channels + c] = static_cast<float>(scale * total);
    }
}

void join_apply_range(const JoinApplyArgs& args, int64_t begin, int64_t end) {
  dispatch(args, [&](auto element, auto act, auto kind) {
    using T = decltype(element);
    using Act = decltype(act);
    if (args.channels_last)
      apply_spans<T, Act, decltype(kind)::value, true>(args, begin, end);
    else
      apply_spans<T, Act, decltype(kind)::value, false>(args, begin, end);
  });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
