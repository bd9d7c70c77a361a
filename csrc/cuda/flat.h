// Ops that treat every element alike: tensors as flat memory, which threads walk in packs; the last one may be partial.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>

#include "common/flat.h"
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace fusedres {
namespace {

constexpr int kFlatThreads = 256;
constexpr int kFlatBlocksPerProcessor = 4;

// Calls f(first element, how many) for the packs of this thread.
template <int kWidth, class F>
__device__ __forceinline__ void for_each_pack(int64_t count, const F& f) {
  const int64_t step = int64_t{gridDim.x} * kFlatThreads * kWidth;
  for (int64_t at = (int64_t{blockIdx.x} * kFlatThreads + threadIdx.x) * kWidth; at < count; at += step)
    f(at, count - at < kWidth ? static_cast<int>(count - at) : kWidth);
}

// The first `n` elements from `at` on; the others are zero.
template <class T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const void* data, int64_t at, int n) {
  const T* p = static_cast<const T*>(data) + at;
  if (n == kWidth) return Pack<T, kWidth>::load(p);
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.lane[i] = i < n ? p[i] : from_float<T>(0.f);
  return pack;
}

template <class T, int kWidth>
__device__ __forceinline__ void store_pack(void* data, int64_t at, int n, const float (&values)[kWidth]) {
  T* p = static_cast<T*>(data) + at;
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.lane[i] = from_float<T>(values[i]);
  if (n == kWidth) return pack.store(p);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < n) p[i] = pack.lane[i];
}

// As many blocks as have a pack for every thread, at most as many as run at once.
inline dim3 flat_grid(int64_t count, int width) {
  const int64_t wanted = ceil_div(ceil_div(count, width), kFlatThreads);
  return dim3(as_dim(std::min<int64_t>(wanted, processors() * kFlatBlocksPerProcessor)));
}

template <class T, class Pointers, class F>
void dispatch_flat_width(const Pointers& pointers, const F& f) {
  constexpr int kWidth = kVectorWidth<T>;
  const bool vectors =
      std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return is_aligned<kWidth>(p, sizeof(T)); });
  vectors ? f(Vector<T, kWidth>{}) : f(Vector<T, 1>{});
}

// Calls f(Vector<T, width>{}) with 16-byte accesses where all pointers allow them (null: an absent tensor).
template <class Pointers, class F>
void dispatch_flat(const char* op, const Tensor& like, const Pointers& pointers, const F& f) {
  using torch::headeronly::ScalarType;
  switch (like.scalar_type()) {
    case ScalarType::Float:
      return dispatch_flat_width<float>(pointers, f);
    case ScalarType::Half:
      return dispatch_flat_width<__half>(pointers, f);
    case ScalarType::BFloat16:
      return dispatch_flat_width<__nv_bfloat16>(pointers, f);
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace fusedres
