// The join's backward on CUDA, in two passes, or in one launch for both; see fusedres/ops/join_backward.py for the
// formulas.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/cooperative.h"
#include "cuda/join.h"
#include "cuda/reduce.h"

namespace fusedres {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;
constexpr int kSums = 3;    // of g, g yhat and g rhat
constexpr int kUnroll = 2;  // rows whose loads a thread has in flight
constexpr int kBlocksPerProcessor = 2;

template <class T, int kWidth>
struct Loaded {
  Pack<T, kWidth> grad, y, residual;

  __device__ __forceinline__ void load(const JoinOperands& a, const Input& from, int64_t row, int64_t column) {
    grad = from.load<T, kWidth>(row, column);
    y = a.y.load<T, kWidth>(row, column);
    residual = a.residual.data == nullptr ? y : a.residual.load<T, kWidth>(row, column);
  }
};

// g = act'(z) grad, with the dropout; what is dropped passes nothing, not even a NaN.
template <class T, bool kDropout, int kWidth>
__device__ __forceinline__ void gradient(const JoinOperands& a, const Pack<T, kWidth>& grad, const float (&z)[kWidth],
                                         const float (&scales)[kWidth], float (&g)[kWidth]) {
  dispatch_activation(a.act, [&](auto act) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float scaled = kDropout ? to_float(grad.lane[i]) * scales[i] : to_float(grad.lane[i]);
      g[i] = decltype(act)::gradient(z[i], scaled, a.act_param);
      if (kDropout && scales[i] == 0.f) g[i] = 0.f;
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// First pass: sums of g, g (y - mean) and g (r - res_mean)
// ---------------------------------------------------------------------------------------------------------------------

struct ReduceArgs : JoinOperands {
  Input grad;
  Output emitted;  // the forward's result, or absent
  Parts parts;
  float* partials;  // [groups * parts, kSums, channels]
  float* sums;      // [kSums, groups, channels]
};

__device__ __forceinline__ void reduce_numbers(const JoinOperands& a, int64_t c, int64_t sample_channel, float* out) {
  affine_numbers(a, c, sample_channel, out);
  out[kMean] = a.norm.mean(a.walk.channels, c);
  out[kResMean] = a.res_norm.mean(a.walk.channels, c);
}

// Adds one row's terms, and emits.
template <class T, int kWidth, bool kDropout>
__device__ __forceinline__ void reduce_row(const ReduceArgs& a, const Loaded<T, kWidth>& in,
                                           const Numbers<kWidth, kReduceNumbers>& numbers, int64_t group, int64_t row,
                                           int64_t column, float (&sums)[kSums][kWidth]) {
  float z[kWidth], scales[kWidth], g[kWidth], mean[kWidth];
  argument(a, numbers, in.y, in.residual, z);
  scales_of<kDropout>(a, group, row, column, scales);
  gradient<T, kDropout>(a, in.grad, z, scales, g);
  numbers.get(kMean, mean);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    sums[0][i] += g[i];
    sums[1][i] = fmaf(g[i], to_float(in.y.lane[i]) - mean[i], sums[1][i]);
  }
  if (a.res_norm.rows != nullptr) {
    numbers.get(kResMean, mean);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[2][i] = fmaf(g[i], to_float(in.residual.lane[i]) - mean[i], sums[2][i]);
  }
  if (a.emitted.data != nullptr)
    a.emitted.store(group * a.walk.rows + row, column, activated<T, kDropout>(a, z, scales));
}

// channels_last: a thread keeps its channels.
template <int kWidth>
struct ReduceShared {
  float sums[kSums][kThreads * kWidth];
  typename Numbers<kWidth, kReduceNumbers>::Storage numbers;
};

template <class T, int kWidth, bool kDropout>
__device__ __forceinline__ void reduce_rows(const ReduceArgs& a, ReduceShared<kWidth>& shared) {
  Numbers<kWidth, kReduceNumbers> numbers(shared.numbers, a.walk);
  const auto compute = [&](int64_t c, int64_t sample_channel, float* out) {
    reduce_numbers(a, c, sample_channel, out);
  };
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    numbers.load_group(a.walk, group, compute);
    float sums[kSums][kWidth] = {};
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kUnroll) {
      Loaded<T, kWidth> in[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k)
        if (first + k * place.step < a.walk.rows)
          in[k].load(a, a.grad, group * a.walk.rows + first + k * place.step, place.column);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k)
        if (first + k * place.step < a.walk.rows)
          reduce_row<T, kWidth, kDropout>(a, in[k], numbers, group, first + k * place.step, place.column, sums);
    }
    const auto slot = [&](int sum, unsigned y) { return &shared.sums[sum][(y * blockDim.x + threadIdx.x) * kWidth]; };
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) slot(s, threadIdx.y)[i] = sums[s][i];
    combine_thread_rows([&](unsigned mine, unsigned other) {
#pragma unroll
      for (int s = 0; s < kSums; ++s)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) slot(s, mine)[i] += slot(s, other)[i];
    });
    if (threadIdx.y == 0 && inside) {
      float* out = a.partials + (group * a.parts.parts + blockIdx.y) * kSums * a.walk.channels + place.column;
#pragma unroll
      for (int s = 0; s < kSums; ++s)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out[s * a.walk.channels + i] = slot(s, 0)[i];
    }
    __syncthreads();  // the next group writes the slots again
  }
}

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kReduceBlocksPerProcessor) join_reduce_rows_kernel(const ReduceArgs a) {
  __shared__ ReduceShared<kWidth> shared;
  reduce_rows<T, kWidth, kDropout>(a, shared);
}

// The contiguous layout: a warp keeps its plane.
template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kReduceBlocksPerProcessor) join_reduce_planes_kernel(const ReduceArgs a) {
  __shared__ typename Numbers<kWidth, kReduceNumbers>::Storage unused;
  Numbers<kWidth, kReduceNumbers> numbers(unused, a.walk);
  const auto compute = [&](int64_t c, int64_t sample_channel, float* out) {
    reduce_numbers(a, c, sample_channel, out);
  };
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < a.walk.rows; row += step) {
    numbers.load_row(a.walk, row, compute);
    float sums[kSums][kWidth] = {};
    for (int64_t column = threadIdx.x * kWidth; column < a.walk.row_length; column += kWarpSize * kWidth) {
      Loaded<T, kWidth> in;
      in.load(a, a.grad, row, column);
      reduce_row<T, kWidth, kDropout>(a, in, numbers, 0, row, column, sums);
    }
    const int64_t sample = a.walk.sample_of(row), channel = a.walk.channel_of(row);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 1; i < kWidth; ++i) sums[s][0] += sums[s][i];
      const float total = warp_sum(sums[s][0]);
      if (threadIdx.x == 0) a.partials[(sample * kSums + s) * a.walk.channels + channel] = total;
    }
  }
}

__global__ void __launch_bounds__(kWarpSize* kMergeSlices, 1) join_reduce_merge_kernel(const ReduceArgs a) {
  const int64_t channels = a.walk.channels, c = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  for (int64_t group = blockIdx.y; group < a.parts.groups; group += gridDim.y) {
    double sums[kSums] = {};
#pragma unroll 2
    for (int64_t part = threadIdx.y; part < a.parts.parts; part += kMergeSlices) {
      if (c >= channels) break;
      const float* from = a.partials + (group * a.parts.parts + part) * kSums * channels + c;
      for (int s = 0; s < kSums; ++s) sums[s] += from[s * channels];
    }
    for (double& sum : sums) sum = sum_of_slices(sum);
    if (c < channels && threadIdx.y == 0) {
      const double factors[kSums] = {1., a.norm.rstd(channels, c), a.res_norm.rstd(channels, c)};
      for (int s = 0; s < kSums; ++s)
        a.sums[(s * a.parts.groups + group) * channels + c] = static_cast<float>(factors[s] * sums[s]);
    }
  }
}

template <class V, bool kDropout>
void launch_reduce(const Device& device, const Tensor& y, ReduceArgs& args, bool by_sample) {
  using T = typename V::Element;
  const Shape shape = args.walk.contiguous
                          ? warps_shape(args.walk)
                          : shape_of(args.walk, V::width, kUnroll, kReduceBlocksPerProcessor, kMostColumns);
  args.parts = parts_of(args.walk, shape, by_sample);
  Tensor partials =
      torch::stable::new_empty(y, {args.parts.groups * args.parts.parts, kSums, args.walk.channels}, kFloat);
  args.partials = device.out<float>(partials);
  if (args.walk.contiguous)
    join_reduce_planes_kernel<T, V::width, kDropout><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  else
    join_reduce_rows_kernel<T, V::width, kDropout><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  const Shape merge = merge_shape(args.walk, args.parts);
  join_reduce_merge_kernel<<<merge.grid, merge.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
}

ReduceArgs reduce_args(const char* op, const Device& device, const Spans& spans, const JoinGiven& given,
                       const Tensor& grad, Tensor* emitted, Tensor& sums) {
  ReduceArgs args{};
  static_cast<JoinOperands&>(args) = given.operands(op, device, spans, given.gain.has_value());
  args.grad = input_of(device, spans, grad);
  if (emitted != nullptr) args.emitted = output_of(device, spans, *emitted);
  args.sums = device.out<float>(sums);
  return args;
}

std::tuple<Tensor, Tensor> join_backward_reduce_cuda(const Tensor& grad, const Tensor& y, std::optional<Tensor> norm,
                                                     std::optional<Tensor> residual, std::optional<Tensor> res_norm,
                                                     int64_t act, double act_param, bool emit,
                                                     std::optional<Tensor> gain, double dropout,
                                                     std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_backward_reduce_cuda";
  if (!residual) res_norm.reset();
  const JoinGiven given{y, norm, residual, res_norm, act, act_param, gain, dropout, seed};
  given.check(kOp);
  check_matches(kOp, "grad", grad, y);
  const Device device(y);
  Tensor out = gain ? torch::stable::new_zeros(y, {kSums, y.size(0), y.size(1)}, kFloat)
                    : torch::stable::new_zeros(y, {kSums, y.size(1)}, kFloat);
  Tensor emitted = emit ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {out, emitted};
  const Layout layout = shared_layout(
      kOp, {{"y", &y}, {"grad", &grad}, {"residual", pointer_to(residual)}, {"y", emit ? &emitted : nullptr}});
  const Spans spans = Spans::of(y, layout);
  ReduceArgs args = reduce_args(kOp, device, spans, given, grad, emit ? &emitted : nullptr, out);
  dispatch_vector(kOp, y, args.walk, {args.y, args.grad, args.residual, as_input(args.emitted)}, [&](auto vector) {
    if (args.dropout.active)
      launch_reduce<decltype(vector), true>(device, y, args, gain.has_value());
    else
      launch_reduce<decltype(vector), false>(device, y, args, gain.has_value());
  });
  return {out, emitted};
}

// ---------------------------------------------------------------------------------------------------------------------
// Second pass
// ---------------------------------------------------------------------------------------------------------------------

struct ApplyArgs : JoinOperands {
  Input grad, addend;
  Output grad_y, grad_residual;  // grad_residual may be absent
  bool training, res_training;   // whether the statistics are the batch's, and have a gradient
  const float *dbeta, *dgamma;   // sums of u and of u yhat
  const float *res_dbeta, *res_dgamma;
  const float* offset;  // [samples, channels], or null: 0
  float share;          // 1 / count
};

// slope and offset of the gradient through a norm, scale g + slope (x - mean) + offset.
__device__ __forceinline__ void stats_numbers(const ApplyArgs& a, const Norm& norm, bool training, const float* dbeta,
                                              const float* dgamma, int64_t c, float& slope, float& offset) {
  const float scale = norm.scale(a.walk.channels, c);
  slope = training ? -scale * norm.rstd(a.walk.channels, c) * (dgamma[c] * a.share) : 0.f;
  offset = training ? -scale * (dbeta[c] * a.share) : 0.f;
}

__device__ __forceinline__ void apply_numbers(const ApplyArgs& a, int64_t c, int64_t sample_channel, float* out) {
  reduce_numbers(a, c, sample_channel, out);
  stats_numbers(a, a.norm, a.training, a.dbeta, a.dgamma, c, out[kSlope], out[kOffset]);
  stats_numbers(a, a.res_norm, a.res_training, a.res_dbeta, a.res_dgamma, c, out[kResSlope], out[kResOffset]);
  if (a.offset != nullptr)
    out[kOffset] = fmaf(a.norm.scale(a.walk.channels, c), a.offset[sample_channel], out[kOffset]);
}

// scale g + slope (x - mean) + offset; constant statistics have no term in x, which may be infinite.
template <class T, int kWidth>
__device__ __forceinline__ void through_norm(const Numbers<kWidth, kApplyNumbers>& numbers, Number scale_of,
                                             Number mean_of, Number slope_of, Number offset_of, bool training,
                                             const float (&g)[kWidth], const Pack<T, kWidth>& x,
                                             float (&result)[kWidth]) {
  float scale[kWidth], offset[kWidth];
  numbers.get(scale_of, scale);
  numbers.get(offset_of, offset);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) result[i] = fmaf(scale[i], g[i], offset[i]);
  if (!training) return;
  numbers.get(mean_of, scale);
  numbers.get(slope_of, offset);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) result[i] = fmaf(offset[i], to_float(x.lane[i]) - scale[i], result[i]);
}

// kRows: rows whose loads a thread has in flight.
template <class T, int kWidth, bool kDropout, int kRows>
__device__ __forceinline__ void apply_rows(const ApplyArgs& a,
                                           typename Numbers<kWidth, kApplyNumbers>::Storage& storage) {
  Numbers<kWidth, kApplyNumbers> numbers(storage, a.walk);
  const auto compute = [&](int64_t c, int64_t sample_channel, float* out) { apply_numbers(a, c, sample_channel, out); };
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    numbers.load_group(a.walk, group, compute);
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kRows) {
      Loaded<T, kWidth> in[kRows];
      Pack<T, kWidth> addend[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = group * a.walk.rows + first + k * place.step;
        if (first + k * place.step >= a.walk.rows) break;
        in[k].load(a, a.grad, row, place.column);
        if (a.addend.data != nullptr) addend[k] = a.addend.load<T, kWidth>(row, place.column);
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) break;
        numbers.load_row(a.walk, row, compute);
        float z[kWidth], scales[kWidth], g[kWidth], result[kWidth];
        argument(a, numbers, in[k].y, in[k].residual, z);
        scales_of<kDropout>(a, group, row, place.column, scales);
        gradient<T, kDropout>(a, in[k].grad, z, scales, g);
        Pack<T, kWidth> out;
        through_norm(numbers, kScale, kMean, kSlope, kOffset, a.training, g, in[k].y, result);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (a.addend.data != nullptr) result[i] += to_float(addend[k].lane[i]);
          out.lane[i] = from_float<T>(result[i]);
        }
        a.grad_y.store(group * a.walk.rows + row, place.column, out);
        if (a.grad_residual.data == nullptr) continue;
        through_norm(numbers, kResScale, kResMean, kResSlope, kResOffset, a.res_training, g, in[k].residual, result);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out.lane[i] = from_float<T>(result[i]);
        a.grad_residual.store(group * a.walk.rows + row, place.column, out);
      }
    }
  }
}

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) join_apply_kernel(const ApplyArgs a) {
  __shared__ typename Numbers<kWidth, kApplyNumbers>::Storage storage;
  apply_rows<T, kWidth, kDropout, kUnroll>(a, storage);
}

// `side`: whether the residual's norm has sums too; `apart`: whether its sum of the gradient is not the main operand's.
void check_sums(const char* op, const Tensor& sums, const Tensor& y, bool side, bool apart) {
  const int64_t least = apart ? kSums + 1 : side ? kSums : kSums - 1;
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) >= least && sums.size(0) <= kSums + 1 && sums.size(1) == y.size(1) &&
                      sums.is_contiguous() && sums.scalar_type() == kFloat,
                  op, ": sums must be a contiguous float32 tensor of shape [R, ", y.size(1), "] with R from ", least,
                  " to ", kSums + 1, apart ? ": the residual's norm is in training beside a gain or an offset" : "");
}

// Whether the statistics of a norm, and of the residual's, are the batch's.
struct Training {
  bool own, residual;
};

ApplyArgs apply_args(const char* op, const Device& device, const Spans& spans, const JoinGiven& given,
                     const Tensor& grad, const std::optional<Tensor>& addend, Tensor& grad_y, Tensor* grad_residual,
                     Training training, const std::optional<Tensor>& sums, const std::optional<Tensor>& offset,
                     double count) {
  ApplyArgs args{};
  static_cast<JoinOperands&>(args) = given.operands(op, device, spans, given.gain || offset);
  args.grad = input_of(device, spans, grad);
  args.addend = input_of(device, spans, addend);
  args.grad_y = output_of(device, spans, grad_y);
  if (grad_residual != nullptr) args.grad_residual = output_of(device, spans, *grad_residual);
  args.training = training.own;
  args.res_training = training.residual;
  if (sums) {
    const float* rows = device.in<float>(sums);
    const bool apart = sums->size(0) > kSums;  // a fourth row: the sum of g, which u is not
    args.dbeta = rows;
    args.dgamma = rows + spans.channels;
    args.res_dgamma = rows + 2 * spans.channels;
    args.res_dbeta = apart ? rows + 3 * spans.channels : rows;
  }
  args.offset = device.in<float>(offset);
  args.share = static_cast<float>(1 / count);
  return args;
}

std::tuple<Tensor, Tensor> join_backward_apply_cuda(const Tensor& grad, const Tensor& y, std::optional<Tensor> norm,
                                                    std::optional<Tensor> residual, std::optional<Tensor> res_norm,
                                                    int64_t act, double act_param, std::optional<Tensor> sums,
                                                    double count, bool training, bool res_training, bool need_residual,
                                                    std::optional<Tensor> gain, double dropout,
                                                    std::optional<Tensor> seed, std::optional<Tensor> offset,
                                                    std::optional<Tensor> addend, std::optional<Tensor> into) {
  constexpr const char* kOp = "join_backward_apply_cuda";
  const JoinGiven given{y, norm, residual, res_norm, act, act_param, gain, dropout, seed};
  given.check(kOp);
  check_matches(kOp, "grad", grad, y);
  if (offset) check_per_sample(kOp, "offset", *offset, y);
  if (addend) check_matches(kOp, "addend", *addend, y);
  if (into) check_matches(kOp, "into", *into, y);
  training = training && norm.has_value();
  res_training = res_training && residual.has_value() && res_norm.has_value();
  STD_TORCH_CHECK(sums.has_value() || !(training || res_training), kOp, ": batch statistics need the sums");
  const bool by_sample = gain || offset;
  if (sums) check_sums(kOp, *sums, y, res_training, res_training && by_sample);

  const Device device(y);
  const bool writes_residual = residual.has_value() && need_residual;
  Tensor grad_y = into ? torch::stable::new_empty(y, {0}) : torch::stable::empty_like(y);
  Tensor grad_residual = writes_residual ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {grad_y, grad_residual};
  Tensor& target = into ? *into : grad_y;
  const Layout layout = shared_layout(kOp, {{"y", &y},
                                            {"grad", &grad},
                                            {"residual", pointer_to(residual)},
                                            {"addend", pointer_to(addend)},
                                            {into ? "into" : "y", &target},
                                            {"y", writes_residual ? &grad_residual : nullptr}});
  const Spans spans = Spans::of(y, layout);
  const ApplyArgs args =
      apply_args(kOp, device, spans, given, grad, addend, target, writes_residual ? &grad_residual : nullptr,
                 {training, res_training}, sums, offset, count);
  const auto tensors = {
      args.y, args.grad, args.residual, args.addend, as_input(args.grad_y), as_input(args.grad_residual)};
  dispatch_vector(kOp, y, args.walk, tensors, [&](auto vector) {
    using V = decltype(vector);
    const Shape shape = shape_of(args.walk, V::width, kUnroll, kBlocksPerProcessor, kMostColumns);
    if (args.dropout.active)
      join_apply_kernel<typename V::Element, V::width, true><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    else
      join_apply_kernel<typename V::Element, V::width, false><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return {grad_y, grad_residual};
}

// ---------------------------------------------------------------------------------------------------------------------
// Both passes
// ---------------------------------------------------------------------------------------------------------------------

struct BackwardArgs {
  ReduceArgs reduce;
  ApplyArgs apply;
};

// What the phases of a launch for both passes keep in shared memory, one after the other.
template <int kWidth>
union BackwardShared {
  ReduceShared<kWidth> reduce;
  double slices[kSums][kThreads];
  typename Numbers<kWidth, kApplyNumbers>::Storage apply;
};

// The sums of all blocks' partials. There is no gain here.
__device__ __forceinline__ void merge_partials(const ReduceArgs& a, double (&slices)[kSums][kThreads]) {
  const int64_t channels = a.walk.channels;
  for_each_merged(channels, [&](int64_t c, bool inside, int slice, int count, int thread, int lanes) {
    double sums[kSums] = {};
#pragma unroll 4
    for (int64_t part = slice; part < a.parts.parts; part += count) {
      if (!inside) break;
      for (int s = 0; s < kSums; ++s) sums[s] += a.partials[(part * kSums + s) * channels + c];
    }
    for (int s = 0; s < kSums; ++s) slices[s][thread] = sums[s];
    __syncthreads();
    if (!inside || slice != 0) return;
    const double factors[kSums] = {1., a.norm.rstd(channels, c), a.res_norm.rstd(channels, c)};
    for (int s = 0; s < kSums; ++s) {
      double total = sums[s];
      for (int i = 1; i < count; ++i) total += slices[s][thread + i * lanes];
      a.sums[s * channels + c] = static_cast<float>(factors[s] * total);
    }
  });
}

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) join_backward_kernel(const BackwardArgs a) {
  __shared__ BackwardShared<kWidth> shared;
  const auto grid = cooperative_groups::this_grid();
  reduce_rows<T, kWidth, kDropout>(a.reduce, shared.reduce);
  grid.sync();
  merge_partials(a.reduce, shared.slices);
  grid.sync();
  apply_rows<T, kWidth, kDropout, 1>(a.apply, shared.apply);  // the cache is near, registers are few
}

template <class V, bool kDropout>
bool launch_both(const Device& device, const Tensor& y, BackwardArgs& args) {
  const Shape shape = shape_of(args.reduce.walk, V::width, kUnroll, kBlocksPerProcessor, kMostColumns);
  const auto kernel = join_backward_kernel<typename V::Element, V::width, kDropout>;
  if (!runs_at_once(kernel, shape)) return false;
  args.reduce.parts = parts_of(args.reduce.walk, shape, false);
  Tensor partials = torch::stable::new_empty(y, {args.reduce.parts.parts, kSums, args.reduce.walk.channels}, kFloat);
  args.reduce.partials = device.out<float>(partials);
  launch_cooperative(kernel, shape, device, args);
  return true;
}

// The tensors that the passes share.
struct BothGiven {
  const Tensor& grad;
  const std::optional<Tensor>& addend;
  Tensor *emitted, *grad_residual;  // null: not wanted
  Tensor &grad_y, &sums;
  Training training;
  double count;
};

// One launch for both passes; false where that cannot be.
bool backward_at_once(const char* op, const Device& device, const JoinGiven& given, const BothGiven& t) {
  const Tensor& y = given.y;
  const Layout layout = shared_layout(op, {{"y", &y},
                                           {"grad", &t.grad},
                                           {"residual", pointer_to(given.residual)},
                                           {"addend", pointer_to(t.addend)},
                                           {"y", t.emitted},
                                           {"into", &t.grad_y},
                                           {"y", t.grad_residual}});
  if (layout == Layout::kContiguous) return false;
  const Spans spans = Spans::of(y, layout);
  BackwardArgs args{reduce_args(op, device, spans, given, t.grad, t.emitted, t.sums),
                    apply_args(op, device, spans, given, t.grad, t.addend, t.grad_y, t.grad_residual, t.training,
                               t.sums, {}, t.count)};
  const auto tensors = {args.apply.y,
                        args.apply.grad,
                        args.apply.residual,
                        args.apply.addend,
                        as_input(args.reduce.emitted),
                        as_input(args.apply.grad_y),
                        as_input(args.apply.grad_residual)};
  bool done = false;
  dispatch_vector(op, y, args.reduce.walk, tensors, [&](auto vector) {
    using V = decltype(vector);
    done = args.reduce.dropout.active ? launch_both<V, true>(device, y, args) : launch_both<V, false>(device, y, args);
  });
  return done;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> join_backward_cuda(
    const Tensor& grad, const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
    std::optional<Tensor> res_norm, int64_t act, double act_param, bool emit, double count, bool training,
    bool res_training, bool need_residual, double dropout, std::optional<Tensor> seed, std::optional<Tensor> addend,
    std::optional<Tensor> into) {
  constexpr const char* kOp = "join_backward_cuda";
  if (!residual) res_norm.reset();
  const JoinGiven given{y, norm, residual, res_norm, act, act_param, {}, dropout, seed};
  given.check(kOp);
  check_matches(kOp, "grad", grad, y);
  if (addend) check_matches(kOp, "addend", *addend, y);
  if (into) check_matches(kOp, "into", *into, y);
  const Device device(y);
  const int64_t read = 2 + residual.has_value() + addend.has_value();
  if (y.numel() > 0 && stays_in_l2(read * y.numel() * y.element_size())) {
    const bool writes_residual = residual.has_value() && need_residual;
    const auto output = [&y](bool wanted) {
      return wanted ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
    };
    Tensor sums = torch::stable::new_empty(y, {kSums, y.size(1)}, kFloat);
    Tensor emitted = output(emit), grad_y = output(!into), grad_residual = output(writes_residual);
    const BothGiven tensors{grad,
                            addend,
                            emit ? &emitted : nullptr,
                            writes_residual ? &grad_residual : nullptr,
                            into ? *into : grad_y,
                            sums,
                            {training && norm.has_value(), res_training && res_norm.has_value()},
                            count};
    if (backward_at_once(kOp, device, given, tensors)) return {sums, emitted, grad_y, grad_residual};
  }
  auto [sums, emitted] =
      join_backward_reduce_cuda(grad, y, norm, residual, res_norm, act, act_param, emit, {}, dropout, seed);
  auto [grad_y, grad_residual] =
      join_backward_apply_cuda(grad, y, norm, residual, res_norm, act, act_param, sums, count, training, res_training,
                               need_residual, {}, dropout, seed, {}, addend, into);
  return {sums, emitted, grad_y, grad_residual};
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("join_backward_cuda", TORCH_BOX(&fusedres::join_backward_cuda));
  m.impl("join_backward_reduce_cuda", TORCH_BOX(&fusedres::join_backward_reduce_cuda));
  m.impl("join_backward_apply_cuda", TORCH_BOX(&fusedres::join_backward_apply_cuda));
}
