// What the join's passes share: its operands and the activation's argument; see fusedres/ops/join.py.
#pragma once

#include "common/activations.h"
#include "common/checks.h"
#include "cuda/dropout.h"
#include "cuda/walk.h"

namespace fusedres {

// fusedres::join_cuda, for ops that fall back to it.
Tensor join_cuda(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                 std::optional<Tensor> res_norm, int64_t act, double act_param, std::optional<Tensor> gain,
                 double dropout, std::optional<Tensor> seed);

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

// The numbers of a channel that a pass needs. The forward needs the first four.
enum Number { kScale, kShift, kResScale, kResShift, kMean, kResMean, kSlope, kOffset, kResSlope, kResOffset };
constexpr int kForwardNumbers = kResShift + 1;
constexpr int kReduceNumbers = kResMean + 1;
constexpr int kApplyNumbers = kResOffset + 1;

// A block has at most so many columns in channels_last, whose numbers it keeps in shared memory: in registers they
// would leave room for few threads, and each would have to load them. In the contiguous layout they come with the row.
constexpr int kMostColumns = 64;

template <int kWidth, int kNumbers>
struct Numbers {
  struct alignas(16) Storage {
    float of[kNumbers][kMostColumns * kWidth];
  };
  Storage& storage;
  bool contiguous;
  float of_row[kNumbers];

  __device__ __forceinline__ Numbers(Storage& storage, const Walk& walk)
      : storage(storage), contiguous(walk.contiguous), of_row{} {}

  // compute(channel, index into [samples, channels], numbers). All threads of the block take part.
  template <class Compute>
  __device__ __forceinline__ void load_group(const Walk& walk, int64_t group, const Compute& compute) {
    if (contiguous) return;
    __syncthreads();  // those of the group before are no longer read
    const int64_t first = int64_t{blockIdx.x} * blockDim.x * kWidth;
    const int threads = blockDim.x * blockDim.y, size = blockDim.x * kWidth;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < size && first + i < walk.channels; i += threads) {
      float numbers[kNumbers];
      compute(first + i, group * walk.channels + first + i, numbers);
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) storage.of[n][i] = numbers[n];
    }
    __syncthreads();
  }

  template <class Compute>
  __device__ __forceinline__ void load_row(const Walk& walk, int64_t row, const Compute& compute) {
    if (contiguous) compute(walk.channel_of(row), row, of_row);
  }

  // Number n of each of the thread's lanes.
  __device__ __forceinline__ void get(Number n, float (&lanes)[kWidth]) const {
    if (contiguous) {
#pragma unroll
      for (float& lane : lanes) lane = of_row[n];
      return;
    }
    constexpr int kStep = kWidth % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < kWidth; i += kStep) {
      const auto some = Pack<float, kStep>::load(&storage.of[n][threadIdx.x * kWidth + i]);
#pragma unroll
      for (int k = 0; k < kStep; ++k) lanes[i + k] = some.lane[k];
    }
  }
};

__device__ __forceinline__ void affine_numbers(const JoinOperands& a, int64_t c, int64_t sample_channel,
                                               float* numbers) {
  const float factor = a.gain == nullptr ? 1.f : a.gain[sample_channel];
  numbers[kScale] = factor * a.norm.scale(a.walk.channels, c);
  numbers[kShift] = factor * a.norm.shift(a.walk.channels, c);
  numbers[kResScale] = a.res_norm.scale(a.walk.channels, c);
  numbers[kResShift] = a.res_norm.shift(a.walk.channels, c);
}

// z = gain (scale y + shift) + r, lane by lane.
template <class T, int kWidth, int kNumbers>
__device__ __forceinline__ void argument(const JoinOperands& a, const Numbers<kWidth, kNumbers>& numbers,
                                         const Pack<T, kWidth>& y, const Pack<T, kWidth>& residual,
                                         float (&z)[kWidth]) {
  float scale[kWidth], shift[kWidth];
  numbers.get(kScale, scale);
  numbers.get(kShift, shift);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] = fmaf(scale[i], to_float(y.lane[i]), shift[i]);
  if (a.residual.data == nullptr) return;
  numbers.get(kResScale, scale);
  numbers.get(kResShift, shift);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] += fmaf(scale[i], to_float(residual.lane[i]), shift[i]);
}

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

struct JoinArgs : JoinOperands {
  Output out;
};

// kRows: rows whose loads a thread has in flight.
template <class T, int kWidth, bool kDropout, int kRows>
__device__ __forceinline__ void join_rows(const JoinArgs& a,
                                          typename Numbers<kWidth, kForwardNumbers>::Storage& storage) {
  using Elements = Pack<T, kWidth>;
  Numbers<kWidth, kForwardNumbers> numbers(storage, a.walk);
  const auto compute = [&](int64_t c, int64_t sample_channel, float* out) {
    affine_numbers(a, c, sample_channel, out);
  };
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    const int64_t before = group * a.walk.rows;
    numbers.load_group(a.walk, group, compute);
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kRows) {
      Elements y[kRows], residual[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) break;
        y[k] = a.y.load<T, kWidth>(before + row, place.column);
        residual[k] = a.residual.data == nullptr ? y[k] : a.residual.load<T, kWidth>(before + row, place.column);
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) break;
        numbers.load_row(a.walk, row, compute);
        float z[kWidth], scales[kWidth];
        argument(a, numbers, y[k], residual[k], z);
        scales_of<kDropout>(a, group, row, place.column, scales);
        a.out.store(before + row, place.column, activated<T, kDropout>(a, z, scales));
      }
    }
  }
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
