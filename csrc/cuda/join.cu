// The join on CUDA: affine, gain, residual, activation and dropout in one pass; see fusedres/ops/join.py for the
// formula. With statistics of the result, for a norm that reads it next, in the same pass.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/bn_stats.h"
#include "cuda/join.h"

namespace fusedres {
namespace {

constexpr int kUnroll = 2;  // rows whose loads a thread has in flight
constexpr int kBlocksPerProcessor = 3;

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) join_fwd_kernel(const JoinArgs a) {
  __shared__ typename Numbers<kWidth, kForwardNumbers>::Storage storage;
  join_rows<T, kWidth, kDropout, kUnroll>(a, storage);
}

}  // namespace

Tensor join_cuda(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                 std::optional<Tensor> res_norm, int64_t act, double act_param, std::optional<Tensor> gain,
                 double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_cuda";
  const JoinGiven given{y, norm, residual, res_norm, act, act_param, gain, dropout, seed};
  given.check(kOp);
  const Device device(y);
  Tensor out = torch::stable::empty_like(y);
  if (y.numel() == 0) return out;
  const Layout layout = shared_layout(kOp, {{"y", &y}, {"residual", pointer_to(residual)}, {"y", &out}});
  const Spans spans = Spans::of(y, layout);
  JoinArgs args{};
  static_cast<JoinOperands&>(args) = given.operands(kOp, device, spans, gain.has_value());
  args.out = output_of(device, spans, out);
  dispatch_vector(kOp, y, args.walk, {args.y, args.residual, as_input(args.out)}, [&](auto vector) {
    using V = decltype(vector);
    const Shape shape = shape_of(args.walk, V::width, kUnroll, kBlocksPerProcessor, kMostColumns);
    if (args.dropout.active)
      join_fwd_kernel<typename V::Element, V::width, true><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    else
      join_fwd_kernel<typename V::Element, V::width, false><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// With statistics
// ---------------------------------------------------------------------------------------------------------------------

namespace {

constexpr int kStatsRows = 2;  // whose loads a thread has in flight, and whose statistics are taken at once

struct JoinStatsArgs {
  JoinArgs join;
  MomentPartials partials;
};

template <int kWidth>
struct JoinStatsShared {
  typename Numbers<kWidth, kForwardNumbers>::Storage numbers;
  MomentShared<kWidth> moments;
};

// channels_last. The statistics are those of the rounded result, relative to its first pixel.
template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kReduceBlocksPerProcessor) join_stats_kernel(const JoinStatsArgs args) {
  using Elements = Pack<T, kWidth>;
  const JoinArgs& a = args.join;
  __shared__ JoinStatsShared<kWidth> shared;
  Numbers<kWidth, kForwardNumbers> numbers(shared.numbers, a.walk);
  const auto compute = [&](int64_t c, int64_t sample_channel, float* out) {
    affine_numbers(a, c, sample_channel, out);
  };
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  const auto load = [&](int64_t row, Elements& y, Elements& residual) {
    y = a.y.load<T, kWidth>(row, place.column);
    residual = a.residual.data == nullptr ? y : a.residual.load<T, kWidth>(row, place.column);
  };
  const auto joined = [&](int64_t group, int64_t row, const Elements& y, const Elements& residual) {
    float z[kWidth], scales[kWidth];
    argument(a, numbers, y, residual, z);
    scales_of<kDropout>(a, group, row, place.column, scales);
    return activated<T, kDropout>(a, z, scales);
  };

  numbers.load_group(a.walk, 0, compute);
  float zero[kWidth] = {};
  if (inside) {
    Elements y, residual;
    load(0, y, residual);
    const Elements first = joined(0, 0, y, residual);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) zero[i] = isfinite(to_float(first.lane[i])) ? to_float(first.lane[i]) : 0.f;
  }
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    const int64_t before = group * a.walk.rows;
    if (group > 0) numbers.load_group(a.walk, group, compute);
    Moments total[kWidth] = {};
    float n = 0;
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kStatsRows) {
      Elements y[kStatsRows], residual[kStatsRows];
      int count = 0;
#pragma unroll
      for (int k = 0; k < kStatsRows; ++k) {
        if (first + k * place.step >= a.walk.rows) break;
        load(before + first + k * place.step, y[k], residual[k]);
        ++count;
      }
#pragma unroll
      for (int k = 0; k < kStatsRows; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) break;
        y[k] = joined(group, row, y[k], residual[k]);
        a.out.store(before + row, place.column, y[k]);
      }
      accumulate(y, count, n, zero, total);
      n += static_cast<float>(count);
    }
    put_block(args.partials, group * gridDim.y + blockIdx.y, place.column, inside, total, n, shared.moments);
  }
}

template <class V>
void launch_stats(const Device& device, const Tensor& y, const JoinArgs& join, Tensor& stats) {
  using T = typename V::Element;
  const Shape shape = shape_of(join.walk, V::width, kStatsRows, kReduceBlocksPerProcessor, kMostColumns);
  Parts parts = parts_of(join.walk, shape, false);
  parts = {false, 1, parts.groups * parts.parts, parts.rows, parts.height, parts.plane, parts.blocks};
  Tensor room =
      torch::stable::new_empty(y, {kMoments, parts.parts, join.walk.channels}, torch::headeronly::ScalarType::Float);
  const JoinStatsArgs args{join, {device.out<float>(room), parts, join.walk.channels}};
  if (join.dropout.active)
    join_stats_kernel<T, V::width, true><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  else
    join_stats_kernel<T, V::width, false><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  StatsArgs merge{};
  merge.walk = join.walk;
  merge.x = as_input(join.out);
  merge.partials = args.partials;
  merge.out = device.out<float>(stats);
  merge_stats<T>(device, merge);
}

std::tuple<Tensor, Tensor> join_stats_cuda(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                                           std::optional<Tensor> res_norm, int64_t act, double act_param,
                                           std::optional<Tensor> gain, double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_stats_cuda";
  const JoinGiven given{y, norm, residual, res_norm, act, act_param, gain, dropout, seed};
  given.check(kOp);
  STD_TORCH_CHECK(y.numel() > 0, kOp, ": y holds no element");
  const Device device(y);
  Tensor out = torch::stable::empty_like(y);
  const Layout layout = shared_layout(kOp, {{"y", &y}, {"residual", pointer_to(residual)}, {"y", &out}});
  if (layout == Layout::kContiguous) {
    out = join_cuda(y, norm, residual, res_norm, act, act_param, gain, dropout, seed);
    return {out, bn_stats_cuda(out, false, {})};
  }
  Tensor stats = torch::stable::new_empty(y, {2, y.size(1)}, torch::headeronly::ScalarType::Float);
  const Spans spans = Spans::of(y, layout);
  JoinArgs args{};
  static_cast<JoinOperands&>(args) = given.operands(kOp, device, spans, gain.has_value());
  args.out = output_of(device, spans, out);
  dispatch_vector(kOp, y, args.walk, {args.y, args.residual, as_input(args.out)},
                  [&](auto vector) { launch_stats<decltype(vector)>(device, y, args, stats); });
  return {out, stats};
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("join_cuda", TORCH_BOX(&fusedres::join_cuda));
  m.impl("join_stats_cuda", TORCH_BOX(&fusedres::join_stats_cuda));
}
