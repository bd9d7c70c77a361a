// Host-side helpers shared by the CPU ops: threads, dtypes, optional tensors, the choice of instruction set.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/isa.h"
#include "common/layout.h"
#include "cpu/types.h"

namespace fusedres {

using torch::stable::Tensor;

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

// Runs body(begin, end) over [0, count), where each step touches about `work` elements.
template <class Body>
void parallel_over(int64_t count, int64_t work, const Body& body) {
  if (count * work <= kGrain) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(work, 1)), body);
}

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, bfloat16 or float16");
  }
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the first tensor");
  STD_TORCH_CHECK(t.dim() == like.dim(), op, ": ", name, " must have as many dimensions as the first tensor");
  for (int64_t d = 0; d < t.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), op, ": ", name, " differs from the first tensor in dimension ", d);
}

inline size_t element_size(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// The rows (mean, rstd, scale, shift) of a norm, or those of the identity where there is none.
class NormRows {
 public:
  NormRows(const char* op, const std::optional<Tensor>& norm, int64_t channels) {
    if (norm) {
      STD_TORCH_CHECK(norm->dim() == 2 && norm->size(0) == 4 && norm->size(1) == channels && norm->is_contiguous() &&
                          norm->scalar_type() == torch::headeronly::ScalarType::Float,
                      op, ": a norm must be a contiguous float32 tensor of shape [4, ", channels, "]");
      base_ = norm->const_data_ptr<float>();
    } else {
      identity_.assign(4 * channels, 0.f);
      std::fill(identity_.begin() + channels, identity_.begin() + 3 * channels, 1.f);
      base_ = identity_.data();
    }
    channels_ = channels;
  }
  const float* mean() const { return base_; }
  const float* rstd() const { return base_ + channels_; }
  const float* scale() const { return base_ + 2 * channels_; }
  const float* shift() const { return base_ + 3 * channels_; }

 private:
  const float* base_;
  int64_t channels_;
  std::vector<float> identity_;
};

// Picks the variant of a range kernel that this machine runs.
template <class Function>
Function* for_active_isa(Function* scalar, Function* avx2, Function* avx512) {
  switch (active_isa()) {
    case Isa::kScalar:
      return scalar;
    case Isa::kAvx2:
      return avx2;
    default:
      return avx512;
  }
}

}  // namespace fusedres

#ifdef FUSEDRES_NO_X86
#define FR_FOR_ACTIVE_ISA(function) (&::fusedres::scalar::function)
#else
#define FR_FOR_ACTIVE_ISA(function) \
  ::fusedres::for_active_isa(&::fusedres::scalar::function, &::fusedres::avx2::function, &::fusedres::avx512::function)
#endif
