// Host-side helpers shared by the CPU ops: threads, dtypes, optional tensors, the choice of instruction set.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/checks.h"
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

// The rows (mean, rstd, scale, shift) of a norm, or those of the identity where there is none.
class NormRows {
 public:
  NormRows(const char* op, const char* name, const std::optional<Tensor>& norm, const Tensor& like)
      : channels_(like.size(1)) {
    if (norm) {
      check_norm(op, name, *norm, like);
      base_ = norm->const_data_ptr<float>();
    } else {
      identity_.assign(4 * channels_, 0.f);
      std::fill(identity_.begin() + channels_, identity_.begin() + 3 * channels_, 1.f);
      base_ = identity_.data();
    }
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

// The main operand's affine with a gain in it, if there is one: a row per sample, or the norm's own, which all share.
class GainedRows {
 public:
  GainedRows(const NormRows& norm, const std::optional<Tensor>& gain, bool per_sample, const Tensor& like)
      : scale_(norm.scale()), shift_(norm.shift()) {
    if (!per_sample) return;
    const int64_t channels = like.size(1), size = like.size(0) * channels;
    const float* factor = gain ? gain->const_data_ptr<float>() : nullptr;
    products_.resize(2 * size);
    float *scale = products_.data(), *shift = scale + size;
    for (int64_t i = 0; i < size; i += channels)
      for (int64_t c = 0; c < channels; ++c) {
        const float f = factor ? factor[i + c] : 1.f;
        scale[i + c] = f * scale_[c];
        shift[i + c] = f * shift_[c];
      }
    scale_ = scale;
    shift_ = shift;
  }
  const float* scale() const { return scale_; }
  const float* shift() const { return shift_; }

 private:
  const float *scale_, *shift_;
  std::vector<float> products_;
};

// The pieces of a reduction over a whole tensor.
struct Cut {
  Cut(const Spans& spans, bool per_sample, int64_t longest) {
    const bool whole = spans.layout == Layout::kChannelsLast && !per_sample;
    const int64_t length = whole ? spans.pixels : spans.plane;
    pieces = {length, longest, (length + longest - 1) / longest};
    parts = spans.pixels / length * pieces.per_run;
    groups = per_sample ? spans.samples() : 1;
  }
  int64_t parts_per_group() const { return parts / groups; }

  Pieces pieces;
  int64_t parts;
  int64_t groups;  // results per channel
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
