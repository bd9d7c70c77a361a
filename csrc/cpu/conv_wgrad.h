// The weight gradient of a convolution as a sum of outer products; see fusedres/ops/conv_wgrad.py for the formula.
//
// In channels_last a pixel's channels are contiguous in both operands, so dW[k, tap, c] += dY[p, k] X[p + tap, c] needs
// no transposition: a tile of kTileK x kTileC sums stays in registers while pixels stream by. Output rows are taken a
// block at a time and packed into panels that fit a core's cache: X with a halo of zeros, and with the pending norm and
// activation applied on the way; dY in strips of kTileK channels. What Winograd's filtering suits goes there instead,
// see winograd.h.
#pragma once

#include "cpu/types.h"

namespace fusedres {

constexpr int kTileK = 8;
constexpr int kTileC = 32;
constexpr int64_t kMaxBlockRows = 512;
constexpr int64_t kPanelSkewBytes = 64;

struct WgradArgs {
  DType dtype;
  // The value that the convolution read: x itself, or act(scale x + shift).
  bool pending;
  int64_t act;
  float act_param;
  const float *scale, *shift;
  const void* x;
  const void* grad;
  int64_t channels, filters;
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of grad
  int64_t rows;                   // output rows of all samples
  int64_t last_width;             // pixels in the very last row, the others have out_width
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t block_rows;  // output rows in a block: a function of the shape alone, so that sums have one order
  // The result, any dtype and strides, in elements.
  DType out_dtype;
  void* out;
  int64_t out_stride_k, out_stride_c, out_stride_h, out_stride_w;
};

// One piece of the result, filters [k_begin, k_end) x channels [c_begin, c_end), and room for the work on it.
struct WgradTask {
  int64_t k_begin, k_end, c_begin, c_end;
  void* x_panels;
  void* grad_panels;
  float* sums;
};

// Room that a task of the given extent needs, in elements of the panels' dtype and in floats.
struct WgradRoom {
  int64_t x_panels, grad_panels, sums;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The packed picture of x: which of its rows and columns a block of output rows touches.
struct WgradWindow {
  // With a single tap only the pixels that are read are packed; otherwise all between, and taps step inside.
  int64_t source_step_h, source_step_w, panel_step_h, panel_step_w;
  int64_t columns;       // of a packed row
  int64_t padded_width;  // of a packed row of the gradient: output pixels, made even

  static WgradWindow of(const WgradArgs& a) {
    const bool one_h = a.kernel_h == 1, one_w = a.kernel_w == 1;
    WgradWindow w{};
    w.source_step_h = one_h ? a.stride_h : 1;
    w.source_step_w = one_w ? a.stride_w : 1;
    w.panel_step_h = one_h ? 1 : a.stride_h;
    w.panel_step_w = one_w ? 1 : a.stride_w;
    w.padded_width = divide_up(a.out_width, 2) * 2;
    w.columns = (a.out_width - 1) * w.panel_step_w + (a.kernel_w - 1) * a.dilation_w + 1;
    return w;
  }

  // Packed rows for `count` consecutive output rows of one sample.
  int64_t packed_rows(const WgradArgs& a, int64_t count) const {
    return (count - 1) * panel_step_h + (a.kernel_h - 1) * a.dilation_h + 1;
  }
};

inline WgradRoom wgrad_room(const WgradArgs& a, int64_t filters, int64_t channels) {
  const WgradWindow w = WgradWindow::of(a);
  // Every sample that a block touches brings a halo of its own.
  const int64_t samples = a.block_rows / a.out_height + 2;
  const int64_t rows = a.block_rows * w.panel_step_h + samples * ((a.kernel_h - 1) * a.dilation_h + 1);
  const int64_t k = divide_up(filters, kTileK) * kTileK, c = divide_up(channels, kTileC) * kTileC;
  // The skew in elements of the smallest panel dtype, between panels and strips alike.
  const int64_t skew = kPanelSkewBytes / 2;
  return {rows * w.columns * c + c / kTileC * skew, a.block_rows * w.padded_width * k + k / kTileK * skew,
          k * c * a.kernel_h * a.kernel_w};
}

}  // namespace fusedres

FR_DECLARE_FOR_EACH_ISA(void wgrad_task(const WgradArgs& args, const WgradTask& task))
namespace fusedres {
namespace avx512bf16 {
// The same for bfloat16 operands through the dot-product instruction, two pixels at a time.
void wgrad_task(const WgradArgs& args, const WgradTask& task);
}  // namespace avx512bf16
}  // namespace fusedres
