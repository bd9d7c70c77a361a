// Batch statistics on CUDA: what the passes that take them share.
//
// Values are taken relative to their channel's first one, so that a large mean costs a small variance nothing. A thread
// reads a few rows at a time, whose mean and M2 are taken from registers, and merges them by Chan's formula into its
// own; threads, then blocks, are merged the same way.
#pragma once

#include <optional>

#include "cuda/reduce.h"

namespace fusedres {

// fusedres::bn_stats_cuda, for ops that fall back to it.
Tensor bn_stats_cuda(const Tensor& x, bool per_sample, std::optional<Tensor> into);

namespace {

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
template <class T, int kWidth, int kUnroll>
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

// Where blocks leave their moments: [kMoments, groups * parts, channels].
struct MomentPartials {
  float* data;
  Parts parts;
  int64_t channels;

  __device__ __forceinline__ int64_t all() const { return parts.groups * parts.parts * channels; }
  __device__ __forceinline__ void put(int64_t part, int64_t channel, const Moments& moments) const {
    const int64_t at = part * channels + channel;
    data[at] = moments.sum;
    data[all() + at] = moments.mean;
    data[2 * all() + at] = moments.m2;
  }
};

// A sum over parts, from which the moments of all their values follow: with values relative to an origin, in double, it
// does not cancel.
struct MomentSums {
  double count, plain, sum, square;

  __device__ __forceinline__ void add(const MomentPartials& from, int64_t part, int64_t channel, int64_t values) {
    const int64_t at = part * from.channels + channel;
    const double n = static_cast<double>(values), mean = from.data[from.all() + at];
    count += n;
    plain += from.data[at];
    sum += n * mean;
    square += from.data[2 * from.all() + at] + n * mean * mean;
  }
  // Of the values themselves; `origin` is what they were taken relative to.
  __device__ __forceinline__ double mean(double origin) const {
    const double relative = sum / count, shifted = relative + origin;
    return fabs(shifted) > fabs(relative) ? shifted : plain / count;
  }
  __device__ __forceinline__ double m2() const {
    const double m2 = square - sum * (sum / count);
    return m2 < 0 ? 0 : m2;
  }
};

template <int kWidth>
struct MomentShared {
  float counts[kThreads];
  Moments slots[kThreads * kWidth];
};

// Merges what the threads of a block have of the same channels, `n` values each, into partial `part`. channels_last.
template <int kWidth>
__device__ __forceinline__ void put_block(const MomentPartials& into, int64_t part, int64_t column, bool inside,
                                          const Moments (&total)[kWidth], float n, MomentShared<kWidth>& shared) {
  const auto slot = [&](unsigned y) { return &shared.slots[(y * blockDim.x + threadIdx.x) * kWidth]; };
#pragma unroll
  for (int i = 0; i < kWidth; ++i) slot(threadIdx.y)[i] = total[i];
  if (threadIdx.x == 0) shared.counts[threadIdx.y] = n;
  combine_thread_rows([&](unsigned mine, unsigned other) {
    // Counts never change: a thread row's is what it and those that it has taken in were given.
    float n_mine = 0, n_other = 0;
    for (unsigned y = mine; y < blockDim.y; y += 2 * (other - mine)) n_mine += shared.counts[y];
    for (unsigned y = other; y < blockDim.y; y += 2 * (other - mine)) n_other += shared.counts[y];
    const float share = n_other > 0 ? n_other / (n_mine + n_other) : 0.f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) slot(mine)[i].merge(slot(other)[i], n_mine, share);
  });
  if (threadIdx.y == 0 && inside) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) into.put(part, column + i, slot(0)[i]);
  }
  __syncthreads();  // the next group writes the slots again
}

constexpr int kStatsUnroll = 8;  // rows whose loads a thread has in flight, and whose statistics are taken at once

struct StatsArgs {
  Walk walk;
  Input x;
  Output into;  // a copy of x, or absent
  MomentPartials partials;
  float* out;  // [2, groups, channels]
};

// The value that all others of a channel are taken relative to.
template <class T>
__device__ __forceinline__ float origin(const StatsArgs& a, int64_t channel) {
  const float first = to_float(static_cast<const T*>(a.x.data)[a.walk.contiguous ? channel * a.x.pitch : channel]);
  return isfinite(first) ? first : 0.f;
}

// channels_last: a thread keeps its channels.
template <class T, int kWidth>
__device__ __forceinline__ void stats_rows(const StatsArgs& a, MomentShared<kWidth>& shared) {
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  float zero[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) zero[i] = inside ? origin<T>(a, place.column + i) : 0.f;
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    const int64_t begin = group * a.walk.rows;
    Moments total[kWidth] = {};
    float n = 0;
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kStatsUnroll) {
      Pack<T, kWidth> x[kStatsUnroll] = {};
      int count = 0;
#pragma unroll
      for (int k = 0; k < kStatsUnroll; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) continue;
        x[k] = a.x.load<T, kWidth>(begin + row, place.column);
        ++count;
      }
      if (a.into.data != nullptr) {
#pragma unroll
        for (int k = 0; k < kStatsUnroll; ++k)
          if (k < count) a.into.store(begin + first + k * place.step, place.column, x[k]);
      }
      accumulate(x, count, n, zero, total);
      n += static_cast<float>(count);
    }
    put_block(a.partials, group * a.partials.parts.parts + blockIdx.y, place.column, inside, total, n, shared);
  }
}

// Chan's merge of all parts at once.
template <class T>
__global__ void __launch_bounds__(kWarpSize* kMergeSlices, 1) bn_stats_merge_kernel(const StatsArgs a) {
  const int64_t channels = a.walk.channels, c = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  const Parts& parts = a.partials.parts;
  for (int64_t group = blockIdx.y; group < parts.groups; group += gridDim.y) {
    MomentSums sums{};
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts.parts; part += kMergeSlices) {
      if (c >= channels) break;
      sums.add(a.partials, group * parts.parts + part, c, parts.count(part));
    }
    sums = {sum_of_slices(sums.count), sum_of_slices(sums.plain), sum_of_slices(sums.sum), sum_of_slices(sums.square)};
    if (c < channels && threadIdx.y == 0) {
      a.out[group * channels + c] = static_cast<float>(sums.mean(origin<T>(a, c)));
      a.out[(parts.groups + group) * channels + c] = static_cast<float>(sums.m2());
    }
  }
}

template <class T>
void merge_stats(const Device& device, const StatsArgs& args) {
  const Shape merge = merge_shape(args.walk, args.partials.parts);
  bn_stats_merge_kernel<T><<<merge.grid, merge.block, 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace fusedres
