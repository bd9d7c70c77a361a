// Passes that wait for each other inside one launch: for tensors so small that the second pass finds what the first has
// read in the L2 cache, and so small that launches cost about what passes do.
#pragma once

#include <cooperative_groups.h>

#include "cuda/walk.h"

namespace fusedres {
namespace {

// Whether what the first pass reads is still in the L2 cache for the last one: half of it is left to what is written.
inline bool stays_in_l2(int64_t bytes) {
  int device = 0, l2 = 0, cooperative = 0;
  FR_CUDA_CHECK(cudaGetDevice(&device));
  FR_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  FR_CUDA_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  return cooperative != 0 && bytes <= l2 / 2;
}

// Whether all blocks of this shape run at once, as blocks that wait for each other must.
template <class Args>
bool runs_at_once(void (*kernel)(Args), const Shape& shape) {
  const int threads = static_cast<int>(shape.block.x * shape.block.y);
  int resident = 0;
  FR_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0));
  return int64_t{shape.grid.x} * shape.grid.y * shape.grid.z <= resident * processors();
}

template <class Args>
void launch_cooperative(void (*kernel)(Args), const Shape& shape, const Device& device, const Args& args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.stream = device.stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  FR_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

constexpr int kMergeLanes = 8;  // channels of a block at a time: their floats fill a sector

// The phase in between, which merges what the blocks left: the blocks share the channels, the threads of a block what
// is there of each. Calls merge(channel, whether this thread takes part, its slice, of how many, its number in the
// block, how far apart the slices of a channel are in such numbers), which may wait at a block barrier.
template <class Merge>
__device__ __forceinline__ void for_each_merged(int64_t channels, const Merge& merge) {
  const int threads = blockDim.x * blockDim.y, lanes = min(kMergeLanes, threads), count = threads / lanes;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, slice = thread / lanes;
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x, blocks = int64_t{gridDim.x} * gridDim.y;
  for (int64_t first = block * lanes; first < channels; first += blocks * lanes) {
    const int64_t c = first + thread % lanes;
    merge(c, c < channels && slice < count, slice, count, thread, lanes);
    __syncthreads();  // the next channels come into the same places
  }
}

}  // namespace
}  // namespace fusedres
