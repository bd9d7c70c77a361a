// Reductions without atomics: partial results of blocks, merged by a second kernel in an order that is always the same.
#pragma once

#include "cuda/walk.h"

namespace fusedres {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// A reduction has few blocks per processor: each of its results is written and read again.
constexpr int kReduceBlocksPerProcessor = 2;

// channels_last: every group is cut into `parts`, one per block, that take turns at `height` rows.
// Contiguous: a part is one sample's plane, of all channels; there is one group, or every sample is one.
struct Parts {
  bool contiguous;
  int64_t groups, parts;
  int64_t rows, height;  // channels_last: rows of a group, and of a block at a time
  int64_t plane;
  int64_t blocks;  // channels_last: of a group; fewer than the parts where several groups are merged into one

  // Values per channel in one part.
  __host__ __device__ __forceinline__ int64_t count(int64_t part) const {
    if (contiguous) return plane;
    const int64_t step = blocks * height, rest = rows % step - part % blocks * height;
    return rows / step * height + (rest < 0 ? 0 : rest < height ? rest : height);
  }
};

inline Parts parts_of(const Walk& walk, const Shape& shape, bool by_sample) {
  const int64_t blocks = shape.grid.y;
  if (!walk.contiguous) return {false, walk.groups, blocks, walk.rows, shape.block.y, walk.plane, blocks};
  const int64_t samples = walk.rows / walk.channels;
  return {true, by_sample ? samples : 1, by_sample ? 1 : samples, 0, 0, walk.plane, 0};
}

// The contiguous layout's shape: a warp for every row.
inline Shape warps_shape(const Walk& walk) {
  constexpr int64_t kWarps = kThreads / kWarpSize;
  constexpr int64_t kBlocks = 8;  // of a processor at once
  const int64_t blocks = std::min(ceil_div(walk.rows, kWarps), processors() * kBlocks);
  return {dim3(as_dim(blocks)), dim3(kWarpSize, kWarps)};
}

// Calls combine(mine, other) for pairs of a block's thread rows until the first has everything; pairs with barriers.
template <class Combine>
__device__ __forceinline__ void combine_thread_rows(const Combine& combine) {
  unsigned half = 1;
  while (half < blockDim.y) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half && threadIdx.y + half < blockDim.y) combine(threadIdx.y, threadIdx.y + half);
  }
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

// The merging kernels: a warp's width of channels, and as many threads that share each channel's parts.
constexpr int kMergeSlices = 32;

inline Shape merge_shape(const Walk& walk, const Parts& parts) {
  const int64_t groups = std::min<int64_t>(parts.groups, 65535);
  return {dim3(as_dim(ceil_div(walk.channels, kWarpSize)), as_dim(groups)), dim3(kWarpSize, kMergeSlices)};
}

// Sums of the slices, for the threads of slice 0. All threads of the block take part.
__device__ __forceinline__ double sum_of_slices(double mine) {
  __shared__ double slices[kMergeSlices][kWarpSize + 1];
  slices[threadIdx.y][threadIdx.x] = mine;
  combine_thread_rows([&](unsigned a, unsigned b) { slices[a][threadIdx.x] += slices[b][threadIdx.x]; });
  const double sum = threadIdx.y == 0 ? slices[0][threadIdx.x] : 0.;
  __syncthreads();  // the next sum overwrites
  return sum;
}

}  // namespace
}  // namespace fusedres
