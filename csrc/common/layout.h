// The memory layouts that the kernels take, and the check that a set of tensors shares one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace fusedres {

enum class Layout { kChannelsLast, kContiguous };

// True where `t` is dense in `layout`. Strides of dimensions of size one say nothing and are not looked at.
inline bool is_dense(const torch::stable::Tensor& t, Layout layout) {
  static constexpr int kOrder[2][4] = {{1, 3, 2, 0}, {3, 2, 1, 0}};  // innermost dimension first
  if (t.dim() != 4) return false;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  for (const int d : kOrder[layout == Layout::kContiguous]) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline bool all_dense(std::initializer_list<const torch::stable::Tensor*> tensors, Layout layout) {
  for (const auto* t : tensors)
    if (t != nullptr && !is_dense(*t, layout)) return false;
  return true;
}

// The one layout in which all tensors are dense, channels_last if both would do; null pointers are absent tensors.
inline Layout common_layout(const char* op, std::initializer_list<const torch::stable::Tensor*> tensors) {
  if (all_dense(tensors, Layout::kChannelsLast)) return Layout::kChannelsLast;
  STD_TORCH_CHECK(all_dense(tensors, Layout::kContiguous), op,
                  ": the 4-d tensors must all be dense in channels_last, or all be contiguous");
  return Layout::kContiguous;
}

// The distance in memory, in elements, between neighbouring pixels of a tensor that is dense in channels_last, or that
// is a slice of such a tensor's channels; 0 where `t` is neither. Strides of dimensions of size one say nothing.
inline int64_t pixel_pitch(const torch::stable::Tensor& t) {
  if (t.dim() != 4) return 0;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  if (sizes[1] != 1 && strides[1] != 1) return 0;
  int64_t pitch = 0, pixels = 1;  // pixels: in one step along dimension d
  for (const int d : {3, 2, 0}) {
    if (sizes[d] != 1) {
      if (pitch == 0) pitch = strides[d] / pixels;
      if (pitch < sizes[1] || strides[d] != pitch * pixels) return 0;
    }
    pixels *= sizes[d];
  }
  return pitch == 0 ? sizes[1] : pitch;
}

// A 4-d argument, with the name that messages give it; a null pointer is an absent one.
struct Operand {
  const char* name;
  const torch::stable::Tensor* t;
};

// The one layout that all operands share, where slices of the channels of a channels_last tensor count as
// channels_last; channels_last if both would do.
inline Layout shared_layout(const char* op, std::initializer_list<Operand> operands) {
  bool last = true, contiguous = true;
  for (const Operand& operand : operands) {
    if (operand.t == nullptr) continue;
    last = last && pixel_pitch(*operand.t) > 0;
    contiguous = contiguous && is_dense(*operand.t, Layout::kContiguous);
    STD_TORCH_CHECK(last || contiguous, op, ": ", operand.name,
                    " must have the layout of all 4-d tensors: dense in channels_last, or a slice of the channels of "
                    "such a tensor, or contiguous");
  }
  return last ? Layout::kChannelsLast : Layout::kContiguous;
}

// A 4-d activation as the kernels walk it: `outer` spans of `inner` neighbouring elements, `pitch_of` apart.
// channels_last: a span is one pixel's channels. Contiguous: a span is one channel's plane.
struct Spans {
  Layout layout;
  int64_t channels;
  int64_t pixels;  // N * H * W
  int64_t plane;   // H * W
  int64_t outer;
  int64_t inner;

  static Spans of(const torch::stable::Tensor& t, Layout layout) {
    const auto s = t.sizes();
    const int64_t plane = s[2] * s[3];
    const bool last = layout == Layout::kChannelsLast;
    return {layout, s[1], s[0] * plane, plane, last ? s[0] * plane : s[0] * s[1], last ? s[1] : plane};
  }

  int64_t samples() const { return pixels / plane; }
  int64_t pitch_of(const torch::stable::Tensor& t) const {
    return layout == Layout::kChannelsLast ? pixel_pitch(t) : plane;
  }
};

inline const torch::stable::Tensor* pointer_to(const std::optional<torch::stable::Tensor>& t) {
  return t ? &*t : nullptr;
}

}  // namespace fusedres
