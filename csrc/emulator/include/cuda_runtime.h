// The part of the CUDA run time and of CUDA C++'s built-in functions that the emulator knows, under the names and with
// the meaning of the CUDA C++ Programming Guide. What is not here does not compile.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "emulator/machine.h"
#include "emulator/ptx.h"

#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")

// ---------------------------------------------------------------------------------------------------------------------
// Vectors
// ---------------------------------------------------------------------------------------------------------------------

#define EMU_VECTORS(T, name, align2, align4)                         \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(double, double, 16, 16)
#undef EMU_VECTORS
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warps
// ---------------------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emu::block_barrier(); }
inline int __syncthreads_count(int predicate) { return emu::block_sum(predicate != 0); }
inline int __syncthreads_or(int predicate) { return emu::block_sum(predicate != 0) > 0; }
inline int __syncthreads_and(int predicate) { return emu::block_sum(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_sync(mask); }
inline void __threadfence() { emu::memory_fence(); }
inline void __threadfence_block() { emu::memory_fence(); }
inline void __threadfence_system() { emu::memory_fence(); }
inline void __nanosleep(unsigned) { emu::spin("__nanosleep"); }
inline unsigned __activemask() { return emu::active_lanes(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emu::lane_index(), w = static_cast<unsigned>(width);
  return emu::shuffle("__shfl_sync", mask, value, lane / w * w + static_cast<unsigned>(source) % w);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emu::lane_index(), w = static_cast<unsigned>(width);
  return emu::shuffle("__shfl_up_sync", mask, value, lane % w < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emu::lane_index(), w = static_cast<unsigned>(width);
  return emu::shuffle("__shfl_down_sync", mask, value, lane % w + delta >= w ? lane : lane + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = emu::lane_index(), w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  // A lane of a later group cannot be read; one of an earlier group can.
  return emu::shuffle("__shfl_xor_sync", mask, value, source / w > lane / w ? lane : source);
}

namespace emu {
template <class F>
auto reduce(const char* what, unsigned mask, unsigned value, F combine) {
  const Exchange& all = exchange(what, mask, &value, sizeof value);
  bool first = true;
  unsigned result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    unsigned other;
    read_slot(all, lane, &other, sizeof other);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}
}  // namespace emu

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate ? 1u << emu::lane_index() : 0u;
  return emu::reduce("__ballot_sync", mask, mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return emu::reduce("__any_sync", mask, predicate != 0, [](unsigned a, unsigned b) { return a | b; }) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emu::reduce("__all_sync", mask, predicate != 0, [](unsigned a, unsigned b) { return a & b; }) != 0;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emu::reduce("__reduce_add_sync", mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emu::reduce("__reduce_max_sync", mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emu::reduce("__reduce_min_sync", mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const emu::Exchange& all = emu::exchange("__match_any_sync", mask, &value, sizeof value);
  unsigned same = 0;
  for (unsigned lane = 0; lane < emu::kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    T other;
    emu::read_slot(all, lane, &other, sizeof other);
    if (other == value) same |= 1u << lane;
  }
  return same;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

inline size_t __cvta_generic_to_shared(const void* p) { return emu::shared_address(p); }
inline size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

namespace emu {
// The order in which threads come here is the schedule's.
template <class T, class F>
T update(T* p, F f) {
  touch(p, sizeof(T), Access::kAtomic);
  T before, after;
  read_quietly(&before, p, sizeof before);
  after = f(before);
  write_quietly(p, &after, sizeof after);
  return before;
}
}  // namespace emu
template <class T>
T atomicAdd(T* p, T v) {
  return emu::update(p, [v](T a) { return static_cast<T>(a + v); });
}
template <class T>
T atomicMax(T* p, T v) {
  return emu::update(p, [v](T a) { return std::max(a, v); });
}
template <class T>
T atomicMin(T* p, T v) {
  return emu::update(p, [v](T a) { return std::min(a, v); });
}
template <class T>
T atomicOr(T* p, T v) {
  return emu::update(p, [v](T a) { return a | v; });
}
template <class T>
T atomicAnd(T* p, T v) {
  return emu::update(p, [v](T a) { return a & v; });
}
template <class T>
T atomicExch(T* p, T v) {
  return emu::update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T compare, T v) {
  return emu::update(p, [compare, v](T a) { return a == compare ? v : a; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.f / ::sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float __expf(float x) { return ::expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x > 0.f ? x < 1.f ? x : 1.f : 0.f; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
namespace emu {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emu
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline void __trap() { emu::fail("__trap()"); }

// ---------------------------------------------------------------------------------------------------------------------
// The host's side
// ---------------------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

extern "C" {
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMemset(void* p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared);

template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...), int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads, shared);
}

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config->attrs[i].val.cooperative != 0;
  const emu::Config c(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, cooperative);
  emu::launch(c, kernel, std::forward<A>(arguments)...);
  return cudaPeekAtLastError();
}
