// Turns the run-time dtype and residual kind of a call into template arguments.
#pragma once

#include "cpu/types.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

template <Residual kValue>
struct ResidualKind {
  static constexpr Residual value = kValue;
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class Body>
FR_INLINE void dispatch_dtype(DType dtype, Body body) {
  if (dtype == DType::kFloat) return body(float{});
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  return body(Float16{});
}

template <class Body>
FR_INLINE void dispatch_residual(Residual kind, Body body) {
  if (kind == Residual::kNone) return body(ResidualKind<Residual::kNone>{});
  if (kind == Residual::kPlain) return body(ResidualKind<Residual::kPlain>{});
  return body(ResidualKind<Residual::kAffine>{});
}

// How much of a vector a step covers: all of it, or the first n lanes at the end of a span.
struct Whole {};
struct Tail {
  int64_t n;
};

template <class T>
FR_INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
FR_INLINE Vec load(const T* p, Tail tail) {
  return load(p, tail.n);
}
template <class T>
FR_INLINE void store(T* p, Vec a, Whole) {
  store(p, a);
}
template <class T>
FR_INLINE void store(T* p, Vec a, Tail tail) {
  store(p, a, tail.n);
}

// Bits as they are, whatever they stand for.
template <class T>
FR_INLINE void copy(T* to, const T* from, Whole) {
  std::memcpy(to, from, Vec::kWidth * sizeof(T));
}
template <class T>
FR_INLINE void copy(T* to, const T* from, Tail tail) {
  std::memcpy(to, from, tail.n * sizeof(T));
}

// Calls step(offset, extent) for every whole vector of a span, then for its tail.
template <class Step>
FR_INLINE void for_each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) step(i, Whole{});
  if (i < n) step(i, Tail{n - i});
}

// A per-channel parameter along a span: one value per lane (channels_last), or one for all (contiguous).
template <bool kPerLane>
struct Parameter {
  const float* p;
  template <class Extent>
  FR_INLINE Vec at(int64_t i, Extent extent) const {
    if constexpr (kPerLane) return load(p + i, extent);
    return Vec(*p);
  }
};

// The same in registers, for kVectors vectors whose offsets are known to the compiler.
template <int kVectors>
struct Held {
  Vec v[kVectors];
  template <bool kPerLane, class Extent>
  FR_INLINE Held(Parameter<kPerLane> parameter, Extent extent) {
    for (int k = 0; k < kVectors; ++k) v[k] = parameter.at(k * Vec::kWidth, extent);
  }
  template <class Extent>
  FR_INLINE Vec at(int64_t i, Extent) const {
    return v[i / Vec::kWidth];
  }
};

// What a join adds: nothing, the residual, or the residual's own affine.
template <Residual kKind, class Parameters>
struct Addend {
  Parameters scale, shift;
  template <class Extent>
  FR_INLINE Vec operator()(Vec z, Vec residual, int64_t i, Extent extent) const {
    if constexpr (kKind == Residual::kPlain) return z + residual;
    if constexpr (kKind == Residual::kAffine) return z + fma(residual, scale.at(i, extent), shift.at(i, extent));
    return z;
  }
};

// Spans from one on that share their parameters, up to `end`: `channel` is where those of a channel begin, `row` where
// those of a sample and channel do.
struct Stretch {
  int64_t channel;
  int64_t row;
  int64_t end;

  template <bool kPerLane, class Args>
  static FR_INLINE Stretch from(const Args& a, int64_t span, int64_t end) {
    if constexpr (!kPerLane) return {span % a.channels, a.per_sample ? span : span % a.channels, span + 1};
    if (!a.per_sample) return {0, 0, end};
    const int64_t sample = span / a.plane, stop = (sample + 1) * a.plane;
    return {0, sample * a.channels, stop < end ? stop : end};
  }
};

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres
