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

}  // namespace
}  // namespace fusedres
