#include "common/activations.h"
#include "cpu/dispatch.h"
#include "cpu/join_backward.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// The parameters that recompute the activation's argument: those of a channel begin at `channel`, those of a sample and
// channel at `row`.
template <bool kPerLane>
struct Affines {
  Parameter<kPerLane> scale, shift, res_scale, res_shift;
  FR_INLINE Affines(const JoinBackwardArgs& a, int64_t channel, int64_t row)
      : scale{a.scale + row},
        shift{a.shift + row},
        res_scale{a.res_scale + channel},
        res_shift{a.res_shift + channel} {}
};

// The activation's argument of one vector.
template <Residual kKind, class Parameters>
struct Recompute {
  Parameters scale, shift;
  Addend<kKind, Parameters> add;

  template <class Extent>
  FR_INLINE Vec operator()(Vec y, Vec residual, int64_t i, Extent extent) const {
    return add(fma(y, scale.at(i, extent), shift.at(i, extent)), residual, i, extent);
  }
};

// A tile of the operands: where it begins and how far its rows are apart in each of them. Rows are pixels
// (channels_last) or stretches of a plane (contiguous).
template <class T>
struct Tile {
  const T *grad, *y, *residual;
  T* emit;  // or null
  int64_t grad_step, y_step, residual_step, emit_step;

  FR_INLINE static Tile of_pixels(const JoinReduceArgs& a, int64_t pixel) {
    return {static_cast<const T*>(a.grad) + pixel * a.grad_pitch,
            static_cast<const T*>(a.y) + pixel * a.y_pitch,
            static_cast<const T*>(a.residual) + pixel * a.residual_pitch,
            a.emit ? static_cast<T*>(a.emit) + pixel * a.channels : nullptr,
            a.grad_pitch,
            a.y_pitch,
            a.residual_pitch,
            a.channels};
  }
  FR_INLINE static Tile of_plane(const JoinReduceArgs& a, int64_t span, int64_t offset) {
    constexpr int64_t kStep = Vec::kWidth;
    const int64_t at = span * a.plane + offset;
    return {static_cast<const T*>(a.grad) + span * a.grad_pitch + offset,
            static_cast<const T*>(a.y) + at,
            static_cast<const T*>(a.residual) + at,
            a.emit ? static_cast<T*>(a.emit) + at : nullptr,
            kStep,
            kStep,
            kStep,
            kStep};
  }
  FR_INLINE Tile from(int64_t i) const {
    return {grad + i, y + i, residual + i, emit ? emit + i : nullptr, grad_step, y_step, residual_step, emit_step};
  }
};

// Terms that are added up in a float before their sum is added to the rest: in floats themselves each such addition
// costs digits that stock PyTorch, which sums in double, has.
template <class T>
constexpr int64_t kTerms = sizeof(T) == sizeof(float) ? 2 : kRun;

// Sums over `rows` rows of kVectors vectors each.
template <class T, class Act, Residual kKind, bool kPerLane, int kVectors, class Extent>
FR_INLINE void reduce_tile(const JoinReduceArgs& a, const Tile<T>& tile, int64_t channel, int64_t row_of_parameters,
                           int64_t rows, Extent extent, Sum<T> (&sums)[kReduceSums][kVectors]) {
  using Parameters = Held<kVectors>;  // read once: loads are what there is least room for
  const Vec param(a.act_param);
  const Affines<kPerLane> p(a, channel, row_of_parameters);
  const Recompute<kKind, Parameters> argument{
      {p.scale, extent}, {p.shift, extent}, {{p.res_scale, extent}, {p.res_shift, extent}}};
  const Parameters mean(Parameter<kPerLane>{a.mean + channel}, extent);
  const Parameters res_mean(Parameter<kPerLane>{a.res_mean + channel}, extent);
  for (int64_t row = 0; row < rows;) {
    const int64_t stop = rows - row < kTerms<T> ? rows : row + kTerms<T>;
    Vec run[kReduceSums][kVectors];
    for (; row < stop; ++row) {
      const T *grad = tile.grad + row * tile.grad_step, *y = tile.y + row * tile.y_step;
      const T* r = tile.residual + row * tile.residual_step;
      T* emit = tile.emit + row * tile.emit_step;
      for (int k = 0; k < kVectors; ++k) {
        const int64_t i = k * Vec::kWidth;
        const Vec value = load(y + i, extent);
        const Vec residual = kKind == Residual::kNone ? Vec() : load(r + i, extent);
        const Vec z = argument(value, residual, i, extent);
        const Vec g = Act::gradient(z, load(grad + i, extent), param);
        run[0][k] = run[0][k] + g;
        run[1][k] = fma(g, value - mean.at(i, extent), run[1][k]);
        if constexpr (kKind == Residual::kAffine) run[2][k] = fma(g, residual - res_mean.at(i, extent), run[2][k]);
        if (tile.emit) store(emit + i, Act::forward(z, param), extent);
      }
    }
    for (int s = 0; s < (kKind == Residual::kAffine ? kReduceSums : kReduceSums - 1); ++s)
      for (int k = 0; k < kVectors; ++k) sums[s][k] = sums[s][k] + run[s][k];
  }
}

template <class T, class Act, Residual kKind>
void reduce_channels_last(const JoinReduceArgs& a, int64_t begin, int64_t end) {
  constexpr int kVectors = kKind == Residual::kAffine ? 2 : 4;  // as many as registers hold
  const int64_t c = a.channels;
  for (int64_t part = begin; part < end; ++part) {
    const Piece piece = piece_at(a.pieces, part);
    const int64_t pixel = piece.run * a.pieces.length + piece.offset, row = a.per_sample ? piece.run * c : 0;
    const Tile<T> tile = Tile<T>::of_pixels(a, pixel);
    const auto strip = [&](int64_t channel, auto vectors, auto extent) {
      constexpr int kStrip = decltype(vectors)::value;
      Sum<T> sums[kReduceSums][kStrip];
      reduce_tile<T, Act, kKind, true, kStrip>(a, tile.from(channel), channel, row + channel, piece.size, extent, sums);
      for (int s = 0; s < kReduceSums; ++s)
        for (int k = 0; k < kStrip; ++k)
          store(a.sums + (s * a.parts + part) * c + channel + k * Vec::kWidth, rounded(sums[s][k]), extent);
    };
    int64_t i = 0;
    for (; i + kVectors * Vec::kWidth <= c; i += kVectors * Vec::kWidth) strip(i, Constant<kVectors>{}, Whole{});
    for_each_vector(c - i, [&](int64_t j, auto extent) { strip(i + j, Constant<1>{}, extent); });
  }
}

template <class T, class Act, Residual kKind>
void reduce_contiguous(const JoinReduceArgs& a, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const Piece piece = piece_at(a.pieces, part);
    const int64_t vectors = piece.size / Vec::kWidth, rest = piece.size % Vec::kWidth;
    for (int64_t channel = 0; channel < a.channels; ++channel) {
      const int64_t span = piece.run * a.channels + channel, row = a.per_sample ? span : channel;
      const Tile<T> tile = Tile<T>::of_plane(a, span, piece.offset);
      Sum<T> sums[kReduceSums][1];
      reduce_tile<T, Act, kKind, false, 1>(a, tile, channel, row, vectors, Whole{}, sums);
      const int64_t done = vectors * Vec::kWidth;
      if (rest)  // lanes past the end load a gradient of zero
        reduce_tile<T, Act, kKind, false, 1>(a, tile.from(done), channel, row, 1, Tail{rest}, sums);
      for (int s = 0; s < kReduceSums; ++s)
        a.sums[(s * a.parts + part) * a.channels + channel] = static_cast<float>(horizontal_sum(sums[s][0]));
    }
  }
}

// The arguments are a copy: what a reference refers to might change with every store, and would be read as often.
template <class T, class Act, Residual kKind, bool kPerLane>
void apply_spans(const JoinApplyArgs a, int64_t begin, int64_t end) {
  const Vec param(a.act_param);
  const int64_t inner = a.inner;
  for (int64_t span = begin; span < end;) {
    const Stretch stretch = Stretch::from<kPerLane>(a, span, end);
    const int64_t channel = stretch.channel;
    const Affines<kPerLane> p(a, channel, stretch.row);
    const Recompute<kKind, Parameter<kPerLane>> argument{p.scale, p.shift, {p.res_scale, p.res_shift}};
    const Parameter<kPerLane> mean{a.mean + channel}, slope{a.slope ? a.slope + channel : nullptr},
        offset{a.offset + stretch.row};
    const Parameter<kPerLane> res_mean{a.res_mean + channel};
    const Parameter<kPerLane> res_slope{a.res_slope ? a.res_slope + channel : nullptr},
        res_offset{a.res_offset + channel};
    for (; span < stretch.end; ++span) {
      const T* grad = static_cast<const T*>(a.grad) + span * a.grad_pitch;
      const T* y = static_cast<const T*>(a.y) + span * a.y_pitch;
      const T* r = static_cast<const T*>(a.residual) + span * a.residual_pitch;
      const T* addend = a.addend ? static_cast<const T*>(a.addend) + span * a.addend_pitch : nullptr;
      T* grad_y = static_cast<T*>(a.grad_y) + span * a.grad_y_pitch;
      T* grad_r = a.grad_residual ? static_cast<T*>(a.grad_residual) + span * inner : nullptr;
      for_each_vector(inner, [&](int64_t i, auto extent) {
        const Vec value = load(y + i, extent);
        const Vec residual = kKind == Residual::kNone ? Vec() : load(r + i, extent);
        const Vec z = argument(value, residual, i, extent);
        const Vec g = Act::gradient(z, load(grad + i, extent), param);
        // Without batch statistics the value takes no part, not even where it is NaN.
        Vec added = offset.at(i, extent);
        if (slope.p) added = fma(slope.at(i, extent), value - mean.at(i, extent), added);
        if (addend) added = added + load(addend + i, extent);
        store(grad_y + i, fma(p.scale.at(i, extent), g, added), extent);
        if constexpr (kKind == Residual::kPlain) {
          if (grad_r) store(grad_r + i, g, extent);
        }
        if constexpr (kKind == Residual::kAffine) {
          Vec side;
          if (res_slope.p)
            side = fma(res_slope.at(i, extent), residual - res_mean.at(i, extent), res_offset.at(i, extent));
          if (grad_r) store(grad_r + i, fma(p.res_scale.at(i, extent), g, side), extent);
        }
      });
    }
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
  constexpr int64_t kBlock = 64;
  const int64_t all_parts = a.groups * a.parts;
  int64_t width = 0;
  for (int64_t column = begin; column < end; column += width) {
    const int64_t group = column / a.channels, c = column % a.channels;
    width = end - column < a.channels - c ? end - column : a.channels - c;
    width = width < kBlock ? width : kBlock;
    for (int s = 0; s < kReduceSums; ++s) {
      double total[kBlock] = {};
      for (int64_t part = 0; part < a.parts; ++part) {
        const float* sums = a.sums + (s * all_parts + group * a.parts + part) * a.channels + c;
        for (int64_t i = 0; i < width; ++i) total[i] += static_cast<double>(sums[i]);
      }
      const float* scale = s == 1 ? a.rstd : a.res_rstd;
      float* out = a.out + s * a.groups * a.channels + column;
      for (int64_t i = 0; i < width; ++i) {
        const double sum = a.factor * total[i];
        out[i] = static_cast<float>(s == 0 ? sum : scale[c + i] * sum);
      }
    }
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
