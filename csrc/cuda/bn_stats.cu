// Batch statistics on CUDA, in one pass over the tensor; see fusedres/ops/bn_stats.py.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "cuda/bn_stats.h"

namespace fusedres {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

// channels_last.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kReduceBlocksPerProcessor) bn_stats_rows_kernel(const StatsArgs a) {
  __shared__ MomentShared<kWidth> shared;
  stats_rows<T, kWidth>(a, shared);
}

// The contiguous layout: a warp keeps its plane.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kReduceBlocksPerProcessor) bn_stats_planes_kernel(const StatsArgs a) {
  const int64_t step = int64_t{gridDim.x} * blockDim.y, columns = a.walk.row_length / kWidth;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < a.walk.rows; row += step) {
    const float first = origin<T>(a, a.walk.channel_of(row));
    float zero[kWidth];
#pragma unroll
    for (float& z : zero) z = first;
    Moments total[kWidth] = {};
    float n = 0;
    for (int64_t at = threadIdx.x; at < columns; at += kWarpSize * kStatsUnroll) {
      Pack<T, kWidth> x[kStatsUnroll] = {};
      int count = 0;
#pragma unroll
      for (int k = 0; k < kStatsUnroll; ++k) {
        const int64_t column = at + k * kWarpSize;
        if (column >= columns) continue;
        x[k] = a.x.load<T, kWidth>(row, column * kWidth);
        ++count;
      }
      if (a.into.data != nullptr) {  // behind all loads, which would otherwise wait for each other
#pragma unroll
        for (int k = 0; k < kStatsUnroll; ++k)
          if (k < count) a.into.store(row, (at + k * kWarpSize) * kWidth, x[k]);
      }
      accumulate(x, count, n, zero, total);
      n += static_cast<float>(count);
    }
#pragma unroll
    for (int i = 1; i < kWidth; ++i)
      total[0].merge(total[i], n * static_cast<float>(i), 1.f / static_cast<float>(i + 1));
    n *= kWidth;
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const Moments other{__shfl_down_sync(kFullMask, total[0].sum, offset),
                          __shfl_down_sync(kFullMask, total[0].mean, offset),
                          __shfl_down_sync(kFullMask, total[0].m2, offset)};
      const float n_other = __shfl_down_sync(kFullMask, n, offset);
      // What lanes without a lane below them make is not used.
      if (n_other > 0) total[0].merge(other, n, n_other / (n + n_other));
      n += n_other;
    }
    if (threadIdx.x == 0) {
      a.partials.put(a.walk.sample_of(row), a.walk.channel_of(row), total[0]);
    }
  }
}

template <class V>
void launch(const Device& device, const Tensor& x, StatsArgs& args, bool per_sample) {
  using T = typename V::Element;
  const Shape shape = args.walk.contiguous
                          ? warps_shape(args.walk)
                          : shape_of(args.walk, V::width, kStatsUnroll, kReduceBlocksPerProcessor, kThreads);
  const Parts parts = parts_of(args.walk, shape, per_sample);
  Tensor partials = torch::stable::new_empty(x, {kMoments, parts.groups * parts.parts, args.walk.channels}, kFloat);
  args.partials = {device.out<float>(partials), parts, args.walk.channels};
  if (args.walk.contiguous)
    bn_stats_planes_kernel<T, V::width><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  else
    bn_stats_rows_kernel<T, V::width><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  merge_stats<T>(device, args);
}

}  // namespace

Tensor bn_stats_cuda(const Tensor& x, bool per_sample, std::optional<Tensor> into) {
  constexpr const char* kOp = "bn_stats_cuda";
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have the 4 dimensions [N, C, H, W], got ", x.dim());
  if (into) check_matches(kOp, "into", *into, x);
  const Device device(x);
  if (per_sample && x.size(0) == 0) return torch::stable::new_empty(x, {2, 0, x.size(1)}, kFloat);
  STD_TORCH_CHECK(x.numel() > 0, kOp, ": x holds no element");
  const Spans spans = Spans::of(x, shared_layout(kOp, {{"x", &x}, {"into", pointer_to(into)}}));
  Tensor out = per_sample ? torch::stable::new_empty(x, {2, x.size(0), x.size(1)}, kFloat)
                          : torch::stable::new_empty(x, {2, x.size(1)}, kFloat);
  StatsArgs args{};
  args.walk = walk_of(spans, per_sample);
  args.x = input_of(device, spans, x);
  if (into) args.into = output_of(device, spans, *into);
  args.out = device.out<float>(out);
  dispatch_vector(kOp, x, args.walk, {args.x, as_input(args.into)},
                  [&](auto vector) { launch<decltype(vector)>(device, x, args, per_sample); });
  return out;
}

}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("bn_stats_cuda", TORCH_BOX(&fusedres::bn_stats_cuda)); }
