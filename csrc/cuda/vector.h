// Small per-channel tensors of any floating dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cuda/launch.h"

namespace fusedres {
namespace {

struct ChannelVector {
  enum class Type { kAbsent, kFloat, kDouble, kBFloat16, kHalf };
  void* data;
  int64_t stride;
  Type type;

  __device__ __forceinline__ double get(int64_t i, double absent) const {
    i *= stride;
    switch (type) {
      case Type::kFloat:
        return static_cast<const float*>(data)[i];
      case Type::kDouble:
        return static_cast<const double*>(data)[i];
      case Type::kBFloat16:
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
      case Type::kHalf:
        return __half2float(static_cast<const __half*>(data)[i]);
      default:
        return absent;
    }
  }

  // Nothing where the tensor is absent.
  __device__ __forceinline__ void set(int64_t i, double value) const {
    i *= stride;
    switch (type) {
      case Type::kFloat:
        static_cast<float*>(data)[i] = static_cast<float>(value);
        return;
      case Type::kDouble:
        static_cast<double*>(data)[i] = value;
        return;
      case Type::kBFloat16:
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(static_cast<float>(value));
        return;
      case Type::kHalf:
        static_cast<__half*>(data)[i] = __float2half_rn(static_cast<float>(value));
        return;
      default:
        return;
    }
  }
};

// The elements of a tensor of any floating dtype and shape, counted in memory.
inline ChannelVector floating_elements(const char* op, const char* name, const Device& device, Tensor& t) {
  using torch::headeronly::ScalarType;
  const auto type = [&] {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return ChannelVector::Type::kFloat;
      case ScalarType::Double:
        return ChannelVector::Type::kDouble;
      case ScalarType::BFloat16:
        return ChannelVector::Type::kBFloat16;
      case ScalarType::Half:
        return ChannelVector::Type::kHalf;
      default:
        STD_TORCH_CHECK(false, op, ": ", name, " must be of a floating dtype");
    }
  }();
  return {device.both(t), 1, type};
}

inline ChannelVector channel_vector(const char* op, const char* name, const Device& device, std::optional<Tensor>& t,
                                    int64_t channels) {
  if (!t) return {nullptr, 0, ChannelVector::Type::kAbsent};
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", name, " must be one-dimensional with ", channels,
                  " values, got ", t->numel());
  ChannelVector vector = floating_elements(op, name, device, *t);
  vector.stride = t->stride(0);
  return vector;
}

}  // namespace
}  // namespace fusedres
