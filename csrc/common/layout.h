// The memory layouts that the kernels take, and the check that a set of tensors shares one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

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

// A 4-d activation as the kernels walk it: `outer` spans of `inner` contiguous elements.
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
};

inline const torch::stable::Tensor* pointer_to(const std::optional<torch::stable::Tensor>& t) {
  return t ? &*t : nullptr;
}

}  // namespace fusedres
