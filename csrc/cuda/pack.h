// Neighbouring elements that move in one memory instruction, and their conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fusedres {
namespace {

constexpr int kVectorBytes = 16;  // the widest access that one thread can make

template <class T>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T lane[kWidth];

  static __device__ __forceinline__ Pack load(const T* p) {
    if constexpr (sizeof(Pack) == sizeof(uint4)) {  // as one value, which no optimisation takes apart
      const uint4 words = *reinterpret_cast<const uint4*>(p);
      return *reinterpret_cast<const Pack*>(&words);
    } else {
      return *reinterpret_cast<const Pack*>(p);
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (sizeof(Pack) == sizeof(uint4))
      *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(this);
    else
      *reinterpret_cast<Pack*>(p) = *this;
  }
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == sizeof(float))
    return v;
  else if constexpr (__is_same(T, __half))
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// A kernel's element type and its elements per access.
template <class T, int kWidth>
struct Vector {
  using Element = T;
  static constexpr int width = kWidth;
};

template <int kWidth>
bool is_aligned(const void* p, size_t element_size) {
  return reinterpret_cast<uintptr_t>(p) % (kWidth * element_size) == 0;
}

}  // namespace
}  // namespace fusedres
