// Argument checks of the kernels' entry points; the messages name the op and the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "common/activations.h"

namespace fusedres {

inline void check_activation(const char* op, int64_t code) {
  STD_TORCH_CHECK(0 <= code && code < kActivationCount, op, ": unknown activation code ", code);
}

inline void check_matches(const char* op, const char* name, const torch::stable::Tensor& t,
                          const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the first tensor");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of the first tensor");
  STD_TORCH_CHECK(t.dim() == like.dim(), op, ": ", name, " must have as many dimensions as the first tensor");
  for (int64_t d = 0; d < t.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), op, ": ", name, " differs from the first tensor in dimension ", d);
}

// A norm is the [4, C] tensor of fusedres/ops/bn_norm.py: rows mean, rstd, scale, shift.
inline void check_norm(const char* op, const char* name, const torch::stable::Tensor& norm,
                       const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(norm.dim() == 2 && norm.size(0) == 4 && norm.size(1) == like.size(1) && norm.is_contiguous() &&
                      norm.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": ", name, " must be a contiguous float32 tensor of shape [4, ", like.size(1), "]");
  STD_TORCH_CHECK(norm.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of the first tensor");
}

// A factor or a term of every sample and channel.
inline void check_per_sample(const char* op, const char* name, const torch::stable::Tensor& t,
                             const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.is_contiguous() &&
                      t.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": ", name, " must be a contiguous float32 tensor of shape [", like.size(0), ", ", like.size(1),
                  "]");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of the first tensor");
}

}  // namespace fusedres
