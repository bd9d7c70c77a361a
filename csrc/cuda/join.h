// What the join's passes share: its operands and the activation's argument; see fusedres/ops/join.py.
#pragma once

#include "common/activations.h"
#include "common/checks.h"
#include "cuda/dropout.h"
#include "cuda/walk.h"

namespace fusedres {
namespace {

// The rows (mean, rstd, scale, shift) of a norm, or null: the identity.
struct Norm {
  const float* rows;

  __device__ __forceinline__ float get(int row, float absent, int64_t channels, int64_t channel) const {
    return rows == nullptr ? absent : rows[row * channels + channel];
  }
  __device__ __forceinline__ float mean(int64_t channels, int64_t c) const { return get(0, 0.f, channels, c); }
  __device__ __forceinline__ float rstd(int64_t channels, int64_t c) const { return get(1, 1.f, channels, c); }
  __device__ __forceinline__ float scale(int64_t channels, int64_t c) const { return get(2, 1.f, channels, c); }
  __device__ __forceinline__ float shift(int64_t channels, int64_t c) const { return get(3, 0.f, channels, c); }
};

struct JoinOperands {
  Walk walk;
  Input y, residual;
  Norm norm, res_norm;
  const float* gain;  // [samples, channels], or null: 1
  int64_t act;
  float act_param;
  Dropout dropout;
};

// Whose numbers lane i of a thread needs: in channels_last those of its own channel, in the contiguous layout all lanes
// those of the row's channel.
struct Lanes {
  int64_t channel;
  int64_t sample_channel;  // the index into [samples, channels]
  int step;

  __device__ __forceinline__ Lanes(const Walk& walk, int64_t group, int64_t row, int64_t column)
      : channel(walk.contiguous ? walk.channel_of(row) : column),
        sample_channel(walk.contiguous ? row : group * walk.channels + column),
        step(walk.contiguous ? 0 : 1) {}
};

template <int kWidth>
struct Affine {
  float scale[kWidth], shift[kWidth];

  // With the gain in it.
  __device__ __forceinline__ void load(const Norm& norm, const float* gain, const Walk& walk, const Lanes& lanes) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t c = lanes.channel + i * lanes.step;
      const float factor = gain == nullptr ? 1.f : gain[lanes.sample_channel + i * lanes.step];
      scale[i] = factor * norm.scale(walk.channels, c);
      shift[i] = factor * norm.shift(walk.channels, c);
    }
  }
  __device__ __forceinline__ float operator()(float x, int i) const { return fmaf(scale[i], x, shift[i]); }
};

// z = gain (scale y + shift) + r, lane by lane.
template <int kWidth>
struct Argument {
  Affine<kWidth> main, side;

  __device__ __forceinline__ void load(const JoinOperands& a, const Lanes& lanes) {
    main.load(a.norm, a.gain, a.walk, lanes);
    side.load(a.res_norm, nullptr, a.walk, lanes);
  }
  template <class T>
  __device__ __forceinline__ void operator()(const JoinOperands& a, const Pack<T, kWidth>& y,
                                             const Pack<T, kWidth>& residual, float (&z)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z[i] = main(to_float(y.lane[i]), i);
      if (a.residual.data != nullptr) z[i] += side(to_float(residual.lane[i]), i);
    }
  }
};

// The dropout's scale of the elements of a pack.
template <bool kDropout, int kWidth>
__device__ __forceinline__ void scales_of(const JoinOperands& a, int64_t group, int64_t row, int64_t column,
                                          float (&scales)[kWidth]) {
  if constexpr (kDropout) {
    const Walk& w = a.walk;
    if (w.contiguous) {
      const int64_t sample = w.sample_of(row), channel = w.channel_of(row);
      keep_scales<kWidth>(a.dropout, (sample * w.plane + column) * w.channels + channel, w.channels, scales);
    } else {
      keep_scales<kWidth>(a.dropout, (group * w.rows + row) * w.channels + column, 1, scales);
    }
  }
}

// The activation of a pack, with the dropout.
template <class T, bool kDropout, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> activated(const JoinOperands& a, const float (&z)[kWidth],
                                                     const float (&scales)[kWidth]) {
  Pack<T, kWidth> out;
  // Inside the kernel, since every thread takes the same branch: one kernel instead of one per activation.
  dispatch_activation(a.act, [&](auto act) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float value = decltype(act)::forward(z[i], a.act_param);
      out.lane[i] = from_float<T>(kDropout ? value * scales[i] : value);
    }
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's side
// ---------------------------------------------------------------------------------------------------------------------

// What the passes are given alike.
struct JoinGiven {
  const Tensor& y;
  const std::optional<Tensor>&norm, &residual, &res_norm;
  int64_t act;
  double act_param;
  const std::optional<Tensor>& gain;
  double dropout;
  const std::optional<Tensor>& seed;

  void check(const char* op) const {
    STD_TORCH_CHECK(y.dim() == 4, op, ": y must have 4 dimensions, got ", y.dim());
    if (residual) check_matches(op, "residual", *residual, y);
    if (norm) check_norm(op, "norm", *norm, y);
    if (res_norm) check_norm(op, "res_norm", *res_norm, y);
    if (gain) check_per_sample(op, "gain", *gain, y);
    check_activation(op, act);
  }

  JoinOperands operands(const char* op, const Device& device, const Spans& spans, bool by_sample) const {
    JoinOperands a{};
    a.walk = walk_of(spans, by_sample);
    a.y = input_of(device, spans, y);
    a.residual = input_of(device, spans, residual);
    a.norm = {device.in<float>(norm)};
    a.res_norm = {device.in<float>(res_norm)};
    a.gain = device.in<float>(gain);
    a.act = act;
    a.act_param = static_cast<float>(act_param);
    a.dropout = dropout_of(op, device, dropout, seed);
    return a;
  }
};

}  // namespace
}  // namespace fusedres
