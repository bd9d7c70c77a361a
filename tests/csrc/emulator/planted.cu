// Kernels that are right, and the same kernels with one bug each: `planted <name>` runs one and prints what the run
// time says, then OK or WRONG for the numbers. Bug 0 of each kernel is no bug.
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

enum Bug {
  kNone,
  kMissingBarrier,
  kMissingWait,
  kWriteAfterRead,
  kGlobalOutOfBounds,
  kSharedOutOfBounds,
  kDivergentBarrier,
  kExitedAtBarrier,
  kUninitialisedShared,
  kUninitialisedGlobal,
  kMissingWarpSync,
  kBlocksRace,
  kMisaligned,
  kMaskWithoutCaller,
  kMaskOfExited,
  kReadsUnnamedLane,
  kMissingArrival,
  kMissingGridSync,
};

constexpr int kThreads = 64;
constexpr int kTile = 64;  // floats

__device__ __forceinline__ void copy16(float* shared, const float* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global) : "memory");
}

// out[i] = sum over tiles of tile[(i + 1) % kTile]: two buffers, filled ahead with cp.async.
template <Bug kBug>
__global__ void __launch_bounds__(kThreads) pipeline(const float* in, float* out, int tiles) {
  __shared__ __align__(16) float buffer[2][kTile];
  const int t = threadIdx.x;
  const auto fetch = [&](int tile) {
    if (t < kTile / 4) copy16(&buffer[tile % 2][4 * t], in + tile * kTile + 4 * t);
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) fetch(tile + 1);
    if (kBug != kMissingWait) {
      if (tile + 1 < tiles)
        asm volatile("cp.async.wait_group 1;\n" ::: "memory");
      else
        asm volatile("cp.async.wait_group 0;\n" ::: "memory");
    }
    if (kBug != kMissingBarrier) __syncthreads();
    sum += buffer[tile % 2][(t + 1) % kTile];
    if (kBug != kWriteAfterRead) __syncthreads();
  }
  out[t] = sum;
}

// out[i] = in[i] + 1, and a block barrier on the way.
template <Bug kBug>
__global__ void __launch_bounds__(kThreads) simple(const float* in, float* out) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  if (kBug == kExitedAtBarrier && t == 5) return;
  if (kBug != kUninitialisedShared || t != 7)
    shared[t + (kBug == kSharedOutOfBounds)] = in[t + (kBug == kGlobalOutOfBounds)];
  if (kBug == kDivergentBarrier) {
    if (t % 2)
      __syncthreads();
    else
      __syncwarp(0x55555555u);
  } else {
    __syncthreads();
  }
  float v = shared[t];
  if (kBug == kMisaligned) {
    const float2 pair = *reinterpret_cast<const float2*>(shared + 1);
    v = pair.x + 0.f * pair.y;
  }
  out[t] = v + 1.f;
}

// out[i] = in[neighbouring lane], through shared memory within a warp.
template <Bug kBug>
__global__ void __launch_bounds__(kThreads) warps(const float* in, float* out) {
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  if (kBug == kMaskOfExited && t == 3) return;
  shared[t] = in[t];
  if (kBug != kMissingWarpSync) __syncwarp();
  float v = shared[t ^ 1];
  if (kBug == kMaskWithoutCaller) v += 0.f * __shfl_xor_sync(0xfffffffeu, v, 2);
  if (kBug == kReadsUnnamedLane && t % 32 < 16) v += 0.f * __shfl_sync(0x0000ffffu, v, 20);
  out[t] = v;
}

// Every block writes its own element, or all the same.
template <Bug kBug>
__global__ void __launch_bounds__(kThreads) blocks(float* out) {
  if (threadIdx.x == 0) out[kBug == kBlocksRace ? 0 : blockIdx.x] = static_cast<float>(blockIdx.x);
}

// Thread 0 produces, the others wait at an mbarrier.
template <Bug kBug>
__global__ void __launch_bounds__(kThreads) barriers(const float* in, float* out) {
  __shared__ uint64_t barrier;
  __shared__ float value;
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(1u) : "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    value = in[0];
    uint64_t state;
    if (kBug != kMissingArrival)
      asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(address) : "memory");
  }
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(address), "r"(0u)
                 : "memory");
  out[threadIdx.x] = value;
}

// Every block sums what all blocks wrote before a grid barrier.
template <Bug kBug>
__global__ void __launch_bounds__(32) grids(float* scratch, float* out) {
  if (threadIdx.x == 0) scratch[blockIdx.x] = 1.f;
  if (kBug != kMissingGridSync) cooperative_groups::this_grid().sync();
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += scratch[i];
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(32) bounded(float* out) { out[threadIdx.x] = 0.f; }
__global__ void dynamic(float* out) {
  extern __shared__ float bytes[];
  bytes[threadIdx.x] = 0.f;
  out[threadIdx.x] = bytes[threadIdx.x];
}

__global__ void one(float* out) { out[0] = 0.f; }
__global__ void __launch_bounds__(32) wasteful(float* out) {
  __shared__ float tile[(48 << 8) + 1];
  tile[threadIdx.x] = 0.f;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void __launch_bounds__(32) both(float* out) {
  extern __shared__ float bytes[];
  __shared__ float tile[10 << 8];
  tile[threadIdx.x] = bytes[threadIdx.x] = 0.f;
  out[threadIdx.x] = tile[threadIdx.x] + bytes[threadIdx.x];
}

struct Case {
  std::vector<float> in, expected;
  float *device_in, *device_out;

  Case(int n, int results, bool initialise = true) : in(n), expected(results) {
    for (int i = 0; i < n; ++i) in[i] = static_cast<float>(i % 97);
    cudaMalloc(&device_in, n * sizeof(float));
    cudaMalloc(&device_out, results * sizeof(float));
    if (initialise) cudaMemcpy(device_in, in.data(), n * sizeof(float), cudaMemcpyHostToDevice);
  }
  void finish() {
    cudaError_t error = cudaGetLastError();
    const cudaError_t later = cudaDeviceSynchronize();
    if (error == cudaSuccess) error = later;
    printf("%s\n", cudaGetErrorString(error));
    std::vector<float> out(expected.size());
    cudaMemcpy(out.data(), device_out, out.size() * sizeof(float), cudaMemcpyDeviceToHost);
    printf("%s\n", memcmp(out.data(), expected.data(), out.size() * sizeof(float)) == 0 ? "OK" : "WRONG");
  }
};

template <Bug kBug>
void run_pipeline() {
  constexpr int kTiles = 5;
  Case c(kTile * kTiles, kThreads);
  for (int i = 0; i < kThreads; ++i)
    for (int tile = 0; tile < kTiles; ++tile) c.expected[i] += c.in[tile * kTile + (i + 1) % kTile];
  pipeline<kBug><<<1, kThreads>>>(c.device_in, c.device_out, kTiles);
  c.finish();
}
template <Bug kBug>
void run_simple() {
  Case c(kThreads, kThreads, kBug != kUninitialisedGlobal);
  for (int i = 0; i < kThreads; ++i) c.expected[i] = c.in[i] + 1.f;
  simple<kBug><<<1, kThreads>>>(c.device_in, c.device_out);
  c.finish();
}
template <Bug kBug>
void run_warps() {
  Case c(kThreads, kThreads);
  for (int i = 0; i < kThreads; ++i) c.expected[i] = c.in[i ^ 1];
  warps<kBug><<<1, kThreads>>>(c.device_in, c.device_out);
  c.finish();
}
template <Bug kBug>
void run_blocks() {
  Case c(1, 4);
  for (int i = 0; i < 4; ++i) c.expected[i] = static_cast<float>(i);
  blocks<kBug><<<4, kThreads>>>(c.device_out);
  c.finish();
}
template <Bug kBug>
void run_barriers() {
  Case c(1, kThreads);
  c.expected.assign(kThreads, c.in[0]);
  barriers<kBug><<<1, kThreads>>>(c.device_in, c.device_out);
  c.finish();
}
template <Bug kBug>
void run_grids(int blocks = 4) {
  Case c(blocks, blocks);
  c.expected.assign(blocks, static_cast<float>(blocks));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(32);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, grids<kBug>, c.device_in, c.device_out);
  c.finish();
}
void run_misaligned_twice() {
  run_simple<kMisaligned>();
  run_simple<kMisaligned>();
}
template <int kBlocks>
void run_many_grids() {
  run_grids<kNone>(kBlocks);
}
// A launch with one of the sizes beyond what compute capability 9.0 has.
void run_shape(dim3 grid, dim3 block) {
  Case c(1, kThreads);
  one<<<grid, block>>>(c.device_out);
  c.finish();
}
void run_too_large_a_block() { run_shape(1, 1056); }
void run_too_deep_a_block() { run_shape(1, dim3(1, 1, 65)); }
void run_too_tall_a_grid() { run_shape(dim3(1, 65536), 1); }
void run_empty_grid() { run_shape(0, 1); }
void run_too_much_static_shared() {
  Case c(1, kThreads);
  wasteful<<<1, 32>>>(c.device_out);
  c.finish();
}
void run_static_and_dynamic_shared() {
  Case c(1, kThreads);
  both<<<1, 32, 40 << 10>>>(c.device_out);
  c.finish();
}
void run_more_shared_than_there_is() {
  Case c(1, kThreads);
  const cudaError_t refused =
      cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1);
  printf("%s: ", refused == cudaSuccess ? "allowed" : "refused");
  c.finish();
}
void run_too_many_threads() {
  Case c(1, kThreads);
  bounded<<<1, kThreads>>>(c.device_out);
  c.finish();
}
void run_too_much_shared() {
  Case c(1, kThreads);
  dynamic<<<1, kThreads, 64 << 10>>>(c.device_out);
  c.finish();
}
void run_much_shared() {
  Case c(1, kThreads);
  cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  dynamic<<<1, kThreads, 64 << 10>>>(c.device_out);
  c.finish();
}

int main(int, char** arguments) {
  const struct {
    const char* name;
    void (*run)();
  } cases[] = {
      {"pipeline", run_pipeline<kNone>},
      {"missing barrier", run_pipeline<kMissingBarrier>},
      {"missing wait", run_pipeline<kMissingWait>},
      {"write after read", run_pipeline<kWriteAfterRead>},
      {"simple", run_simple<kNone>},
      {"global out of bounds", run_simple<kGlobalOutOfBounds>},
      {"shared out of bounds", run_simple<kSharedOutOfBounds>},
      {"divergent barrier", run_simple<kDivergentBarrier>},
      {"exited at barrier", run_simple<kExitedAtBarrier>},
      {"uninitialised shared", run_simple<kUninitialisedShared>},
      {"uninitialised global", run_simple<kUninitialisedGlobal>},
      {"misaligned", run_simple<kMisaligned>},
      {"misaligned twice", run_misaligned_twice},
      {"warps", run_warps<kNone>},
      {"missing warp sync", run_warps<kMissingWarpSync>},
      {"mask without caller", run_warps<kMaskWithoutCaller>},
      {"mask of exited", run_warps<kMaskOfExited>},
      {"reads unnamed lane", run_warps<kReadsUnnamedLane>},
      {"blocks", run_blocks<kNone>},
      {"blocks race", run_blocks<kBlocksRace>},
      {"barriers", run_barriers<kNone>},
      {"missing arrival", run_barriers<kMissingArrival>},
      {"grids", run_many_grids<4>},
      {"many grids", run_many_grids<2 * 32>},
      {"too many cooperative blocks", run_many_grids<2 * 32 + 1>},
      {"missing grid sync", [] { run_grids<kMissingGridSync>(); }},
      {"too large a block", run_too_large_a_block},
      {"too deep a block", run_too_deep_a_block},
      {"too tall a grid", run_too_tall_a_grid},
      {"empty grid", run_empty_grid},
      {"too much static shared", run_too_much_static_shared},
      {"static and dynamic shared", run_static_and_dynamic_shared},
      {"more shared than there is", run_more_shared_than_there_is},
      {"too many threads", run_too_many_threads},
      {"too much shared", run_too_much_shared},
      {"much shared", run_much_shared},
  };
  for (const auto& c : cases)
    if (strcmp(c.name, arguments[1]) == 0) {
      c.run();
      return 0;
    }
  printf("no such case\n");
  return 2;
}
