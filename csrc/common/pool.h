// Max pooling's window, and what its ops ask of their arguments; see fusedres/ops/join_pool.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/layout.h"

namespace fusedres {

constexpr int64_t kMostPositions = 255;  // of a window: their numbers are bytes

// Pairs are (height, width).
struct PoolWindow {
  int64_t kernel[2], stride[2], padding[2];
  bool ceil;

  static PoolWindow of(const char* op, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, bool ceil) {
    STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                    ": kernel, stride and padding must have two values each");
    const PoolWindow window{{kernel[0], kernel[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, ceil};
    window.check(op);
    return window;
  }

  void check(const char* op) const {
    for (int d = 0; d < 2; ++d) {
      STD_TORCH_CHECK(0 < kernel[d] && kernel[d] <= kMostPositions, op, ": kernel must have 1 to ", kMostPositions,
                      " positions, got ", kernel[0], " x ", kernel[1]);
      STD_TORCH_CHECK(0 < stride[d] && stride[d] < (int64_t{1} << 31), op, ": stride must be positive, got ", stride[0],
                      " x ", stride[1]);
      STD_TORCH_CHECK(0 <= padding[d] && 2 * padding[d] <= kernel[d], op, ": padding must be at most half of kernel, ",
                      "got ", padding[0], " x ", padding[1], " of ", kernel[0], " x ", kernel[1]);
    }
    STD_TORCH_CHECK(kernel[0] * kernel[1] <= kMostPositions, op, ": kernel must have 1 to ", kMostPositions,
                    " positions, got ", kernel[0], " x ", kernel[1]);
  }

  // The result's height (dim 0) or width (dim 1). Not positive where no window fits into the image.
  int64_t pooled(int dim, int64_t size) const {
    const int64_t last = size + 2 * padding[dim] - kernel[dim] + (ceil ? stride[dim] - 1 : 0);
    const int64_t steps = last >= 0 ? last / stride[dim] : -((stride[dim] - 1 - last) / stride[dim]);  // rounded down
    // A window that would begin behind the image has nothing in it.
    return steps + (ceil && steps * stride[dim] >= size + padding[dim] ? 0 : 1);
  }
};

inline std::string shape_of_tensor(const torch::stable::Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// Height and width of the result. Every window has a position in the image, so none of an empty image has a result.
inline std::array<int64_t, 2> pooled_image(const char* op, const torch::stable::Tensor& y, const PoolWindow& window) {
  STD_TORCH_CHECK(y.dim() == 4, op, ": y must have 4 dimensions, got ", y.dim());
  const std::array<int64_t, 2> image{window.pooled(0, y.size(2)), window.pooled(1, y.size(3))};
  const bool empty = image[0] == 0 || image[1] == 0 || y.size(0) == 0 || y.size(1) == 0;
  STD_TORCH_CHECK(image[0] >= 0 && image[1] >= 0 && empty == (y.numel() == 0), op, ": no window of ", window.kernel[0],
                  " x ", window.kernel[1], " fits into y of shape ", shape_of_tensor(y));
  return image;
}

// `t` is of a result's size. Whether that was made with `ceil` is not known to a gradient: either will do.
inline void check_pooled(const char* op, const char* name, const torch::stable::Tensor& t,
                         const torch::stable::Tensor& y, PoolWindow window, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(y.dim() == 4, op, ": y must have 4 dimensions, got ", y.dim());
  bool fits = false;
  for (const bool ceil : {false, true}) {
    window.ceil = ceil;
    fits = fits || (t.dim() == 4 && t.size(0) == y.size(0) && t.size(1) == y.size(1) &&
                    t.size(2) == window.pooled(0, y.size(2)) && t.size(3) == window.pooled(1, y.size(3)));
  }
  STD_TORCH_CHECK(fits && (t.numel() == 0) == (y.numel() == 0), op, ": ", name, " of shape ", shape_of_tensor(t),
                  " is no result of pooling y of shape ", shape_of_tensor(y));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype ",
                  dtype == y.scalar_type() ? "of y" : "uint8");
  STD_TORCH_CHECK(t.get_device_index() == y.get_device_index(), op, ": ", name, " must be on the device of y");
}

// What the backward is given.
inline void check_pool_gradient(const char* op, const torch::stable::Tensor& grad, const torch::stable::Tensor& taken,
                                const torch::stable::Tensor& y, const PoolWindow& window) {
  check_pooled(op, "grad", grad, y, window, y.scalar_type());
  check_pooled(op, "taken", taken, y, window, torch::headeronly::ScalarType::Byte);
  STD_TORCH_CHECK(taken.size(2) == grad.size(2) && taken.size(3) == grad.size(3), op, ": taken of shape ",
                  shape_of_tensor(taken), " must have the shape of grad, ", shape_of_tensor(grad));
}

// The layout of what is made of `y`; channels_last if both would do.
inline Layout pooled_layout(const char* op, const torch::stable::Tensor& y) {
  if (y.numel() > 0) return shared_layout(op, {{"y", &y}});
  return is_dense(y, Layout::kChannelsLast) ? Layout::kChannelsLast : Layout::kContiguous;
}

// A tensor of y's samples and channels, and its dtype unless another is given.
inline torch::stable::Tensor empty_image(const torch::stable::Tensor& y, Layout layout, int64_t height, int64_t width,
                                         std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  using torch::stable::transpose;
  if (layout == Layout::kContiguous) return torch::stable::new_empty(y, {y.size(0), y.size(1), height, width}, dtype);
  return transpose(transpose(torch::stable::new_empty(y, {y.size(0), height, width, y.size(1)}, dtype), 1, 3), 2, 3);
}

}  // namespace fusedres
