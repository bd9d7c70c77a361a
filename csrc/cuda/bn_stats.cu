// Batch statistics on CUDA, in one pass over the tensor; see fusedres/ops/bn_stats.py.
//
// Values are taken relative to their channel's first one, so that a large mean costs a small variance nothing. A thread
// reads a few rows at a time, whose mean and M2 are taken from registers, and merges them by Chan's formula into its
// own; threads, then blocks, are merged the same way.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "cuda/reduce.h"

namespace fusedres {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;
constexpr int kUnroll = 8;  // rows whose loads a thread has in flight, and whose statistics are taken at once

struct StatsArgs {
  Walk walk;
  Parts parts;
  Input x;
  Output into;      // a copy of x, or absent
  float* partials;  // [kMoments, groups * parts, channels]
  float* out;       // [2, groups, channels]
};

// The value that all others of a channel are taken relative to.
template <class T>
__device__ __forceinline__ float origin(const StatsArgs& a, int64_t channel) {
  const float first = to_float(static_cast<const T*>(a.x.data)[a.walk.contiguous ? channel * a.x.pitch : channel]);
  return isfinite(first) ? first : 0.f;
}

constexpr int kMoments = 3;
struct Moments {
  float sum;       // of the values themselves
  float mean, m2;  // of the values relative to their channel's first one

  // Chan, Golub and LeVeque (1979), eq. 2.1; `share` is n_b / (n_a + n_b).
  __device__ __forceinline__ void merge(const Moments& b, float n_a, float share) {
    const float delta = b.mean - mean;
    sum += b.sum;
    mean = fmaf(delta, share, mean);
    m2 += fmaf(delta * delta, n_a * share, b.m2);
  }
};

// Mean and M2 of the first `count` packs, lane by lane, merged into those of `before` earlier ones.
template <class T, int kWidth>
__device__ __forceinline__ void accumulate(const Pack<T, kWidth> (&x)[kUnroll], int count, float before,
                                           const float (&zero)[kWidth], Moments (&total)[kWidth]) {
  const float share_of_one = 1.f / static_cast<float>(count);
  const float share = static_cast<float>(count) / (before + static_cast<float>(count));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    Moments here = {};
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const float value = to_float(x[k].lane[i]);
      if (k < count) here.sum += value;
      if (k < count) here.mean += value - zero[i];
    }
    here.mean *= share_of_one;
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const float d = to_float(x[k].lane[i]) - zero[i] - here.mean;
      if (k < count) here.m2 = fmaf(d, d, here.m2);
    }
    total[i].merge(here, before, share);
  }
}

// `all`: results of a kind.
__device__ __forceinline__ void put(const StatsArgs& a, int64_t all, int64_t at, const Moments& moments) {
  a.partials[at] = moments.sum;
  a.partials[all + at] = moments.mean;
  a.partials[2 * all + at] = moments.m2;
}

// channels_last: a thread keeps its channels.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kReduceBlocksPerProcessor) bn_stats_rows_kernel(const StatsArgs a) {
  __shared__ float counts[kThreads];
  __shared__ Moments shared[kThreads * kWidth];
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  float zero[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) zero[i] = inside ? origin<T>(a, place.column + i) : 0.f;
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    const int64_t begin = group * a.walk.rows;
    Moments total[kWidth] = {};
    float n = 0;
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kUnroll) {
      Pack<T, kWidth> x[kUnroll] = {};
      int count = 0;
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) continue;
        x[k] = a.x.load<T, kWidth>(begin + row, place.column);
        ++count;
      }
      if (a.into.data != nullptr) {
#pragma unroll
        for (int k = 0; k < kUnroll; ++k)
          if (k < count) a.into.store(begin + first + k * place.step, place.column, x[k]);
      }
      accumulate(x, count, n, zero, total);
      n += static_cast<float>(count);
    }

    const auto slot = [&](unsigned y) { return &shared[(y * blockDim.x + threadIdx.x) * kWidth]; };
#pragma unroll
    for (int i = 0; i < kWidth; ++i) slot(threadIdx.y)[i] = total[i];
    if (threadIdx.x == 0) counts[threadIdx.y] = n;
    combine_thread_rows([&](unsigned mine, unsigned other) {
      // Counts never change: a thread row's is what it and those that it has taken in were given.
      float n_mine = 0, n_other = 0;
      for (unsigned y = mine; y < blockDim.y; y += 2 * (other - mine)) n_mine += counts[y];
      for (unsigned y = other; y < blockDim.y; y += 2 * (other - mine)) n_other += counts[y];
      const float share = n_other > 0 ? n_other / (n_mine + n_other) : 0.f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) slot(mine)[i].merge(slot(other)[i], n_mine, share);
    });
    if (threadIdx.y == 0 && inside) {
      const int64_t part = group * a.parts.parts + blockIdx.y;
      const int64_t all = a.parts.groups * a.parts.parts * a.walk.channels;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        put(a, all, part * a.walk.channels + place.column + i, slot(0)[i]);
      }
    }
    __syncthreads();  // the next group writes the slots again
  }
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
    for (int64_t at = threadIdx.x; at < columns; at += kWarpSize * kUnroll) {
      Pack<T, kWidth> x[kUnroll] = {};
      int count = 0;
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t column = at + k * kWarpSize;
        if (column >= columns) continue;
        x[k] = a.x.load<T, kWidth>(row, column * kWidth);
        ++count;
        if (a.into.data != nullptr) a.into.store(row, column * kWidth, x[k]);
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
      put(a, a.walk.rows, row, total[0]);
    }
  }
}

// Chan's merge of all parts at once, in double: with values relative to an origin among them, the sums do not cancel.
template <class T>
__global__ void __launch_bounds__(kWarpSize* kMergeSlices, 1) bn_stats_merge_kernel(const StatsArgs a) {
  const int64_t channels = a.walk.channels, c = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  const int64_t all = a.parts.groups * a.parts.parts * channels;
  for (int64_t group = blockIdx.y; group < a.parts.groups; group += gridDim.y) {
    double count = 0, plain = 0, sum = 0, square = 0;
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < a.parts.parts; part += kMergeSlices) {
      if (c >= channels) break;
      const int64_t at = (group * a.parts.parts + part) * channels + c;
      const double n = static_cast<double>(a.parts.count(part)), mean = a.partials[all + at];
      count += n;
      plain += a.partials[at];
      sum += n * mean;
      square += a.partials[2 * all + at] + n * mean * mean;
    }
    count = sum_of_slices(count);
    plain = sum_of_slices(plain);
    sum = sum_of_slices(sum);
    square = sum_of_slices(square);
    if (c < channels && threadIdx.y == 0) {
      const double mean = sum / count, m2 = square - sum * mean;
      const double shifted = mean + static_cast<double>(origin<T>(a, c));
      a.out[group * channels + c] = static_cast<float>(fabs(shifted) > fabs(mean) ? shifted : plain / count);
      a.out[(a.parts.groups + group) * channels + c] = static_cast<float>(m2 < 0 ? 0 : m2);
    }
  }
}

template <class V>
void launch(const Device& device, const Tensor& x, StatsArgs& args, bool per_sample) {
  using T = typename V::Element;
  const Shape shape = args.walk.contiguous
                          ? warps_shape(args.walk)
                          : shape_of(args.walk, V::width, kUnroll, kReduceBlocksPerProcessor, kThreads);
  args.parts = parts_of(args.walk, shape, per_sample);
  Tensor partials =
      torch::stable::new_empty(x, {kMoments, args.parts.groups * args.parts.parts, args.walk.channels}, kFloat);
  args.partials = device.out<float>(partials);
  if (args.walk.contiguous)
    bn_stats_planes_kernel<T, V::width><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  else
    bn_stats_rows_kernel<T, V::width><<<shape.grid, shape.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  const Shape merge = merge_shape(args.walk, args.parts);
  bn_stats_merge_kernel<T><<<merge.grid, merge.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
}

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

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("bn_stats_cuda", TORCH_BOX(&fusedres::bn_stats_cuda)); }
