// The body of a weight-gradient task, over the arithmetic of a policy: float panels and fused multiply-add, or bfloat16
// panels and the dot-product instruction.
#pragma once

#include "common/activations.h"
#include "cpu/conv_wgrad.h"
#include "cpu/dispatch.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// An output row inside a block: where its taps start in the packed x, where its packed gradient lies, its pixels.
struct PackedRow {
  int64_t x, grad, width;
};

struct Block {
  int64_t first, count;  // output rows
  int64_t packed_rows;   // of x, all samples
  PackedRow rows[kMaxBlockRows];
};

struct FloatArithmetic {
  using Panel = float;
  static constexpr int kPixels = 1;

  static FR_INLINE void store_x(Panel* to, Vec value) { store(to, value); }

  // kTileK filters of one pixel.
  template <class T>
  static FR_INLINE void pack_strip(Panel* to, const T* from, const T*) {
    for (int64_t k = 0; k < kTileK; ++k) to[k] = to_float(from[k]);
  }

  // sums[k][c] += sum over the block's pixels of grad[pixel][k] x[pixel][c]. The block is summed on its own first, so
  // that rounding errors grow with the block and with the number of blocks, not with their product.
  static FR_INLINE void tile(const Panel* x, int64_t x_step, const Panel* grad, const PackedRow* rows, int64_t count,
                             int64_t tap, bool first, float* sums) {
    constexpr int kVectors = Vec::kWidth == 16 ? 2 : 1;  // channels at a time: as registers hold sums for
    for (int64_t c = 0; c < kTileC; c += kVectors * Vec::kWidth) {
      Vec acc[kTileK][kVectors];
      for (int64_t row = 0; row < count; ++row) {
        const Panel* xp = x + (rows[row].x + tap) * kTileC + c;
        const Panel* gp = grad + rows[row].grad * kTileK;
        for (int64_t i = 0; i < rows[row].width; ++i, xp += x_step * kTileC, gp += kTileK) {
          Vec values[kVectors];
          for (int v = 0; v < kVectors; ++v) values[v] = load(xp + v * Vec::kWidth);
          for (int k = 0; k < kTileK; ++k) {
            const Vec g(gp[k]);
            for (int v = 0; v < kVectors; ++v) acc[k][v] = fma(g, values[v], acc[k][v]);
          }
        }
      }
      for (int k = 0; k < kTileK; ++k)
        for (int v = 0; v < kVectors; ++v) {
          float* to = sums + k * kTileC + c + v * Vec::kWidth;
          store(to, first ? acc[k][v] : load(to) + acc[k][v]);
        }
    }
  }

  // The sums of one filter in the order of the channels.
  static FR_INLINE void ordered(const float* sums, float* row) {
    for (int64_t c = 0; c < kTileC; ++c) row[c] = sums[c];
  }
};

// Asks for the next block's gradient a little before every tile, so that memory is busy while the arithmetic is.
template <class T>
class NextRows {
 public:
  FR_INLINE NextRows(const WgradArgs& a, const WgradTask& t, int64_t row, int64_t steps)
      : stride_(a.filters * sizeof(T)), bytes_((t.k_end - t.k_begin) * sizeof(T)) {
    const int64_t left = a.rows - row < a.block_rows ? a.rows - row : a.block_rows;
    const int64_t pixels = left > 0 ? left * a.out_width - (a.out_width - a.last_width) : 0;
    at_ = static_cast<const char*>(a.grad) + (row * a.out_width * a.filters + t.k_begin) * sizeof(T);
    end_ = at_ + pixels * stride_;
    per_step_ = divide_up(pixels, steps);
  }

  FR_INLINE void prefetch() {
    for (int64_t i = 0; i < per_step_ && at_ < end_; ++i, at_ += stride_)
      for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(at_ + byte, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t stride_, bytes_, per_step_;
};

template <class Arithmetic>
class WgradBody {
 public:
  using Panel = typename Arithmetic::Panel;

  FR_INLINE WgradBody(const WgradArgs& args, const WgradTask& task)
      : a_(args),
        t_(task),
        window_(WgradWindow::of(args)),
        k_panels_(divide_up(task.k_end - task.k_begin, kTileK)),
        c_panels_(divide_up(task.c_end - task.c_begin, kTileC)) {}

  template <class T, class Act, bool kPending>
  FR_INLINE void run() {
    Block block;
    for (int64_t first = 0; first < a_.rows; first += a_.block_rows) {
      plan(first, block);
      pack_grad<T>(block);
      pack_x<T, Act, kPending>(block);
      accumulate<T>(block);
    }
    dispatch_dtype(a_.out_dtype, [&](auto element) { write_out<decltype(element)>(); });
  }

 private:
  const WgradArgs& a_;
  const WgradTask& t_;
  const WgradWindow window_;
  const int64_t k_panels_, c_panels_;

  int64_t width_of(int64_t row) const { return row + 1 == a_.rows ? a_.last_width : a_.out_width; }

  // Elements from one strip, or panel, to the next. A cache line more than they hold: a power of two would send the
  // same pixel of all of them to one set of the cache.
  static constexpr int64_t kSkew = kPanelSkewBytes / sizeof(Panel);
  int64_t strip_of(const Block& block) const { return block.count * window_.padded_width * kTileK + kSkew; }
  int64_t panel_of(int64_t packed_rows) const { return packed_rows * window_.columns * kTileC + kSkew; }

  void plan(int64_t first, Block& block) const {
    block.first = first;
    block.count = a_.rows - first < a_.block_rows ? a_.rows - first : a_.block_rows;
    int64_t base = 0;
    for (int64_t i = 0; i < block.count;) {
      const int64_t oh = (first + i) % a_.out_height;
      const int64_t left = a_.out_height - oh;
      const int64_t rows = left < block.count - i ? left : block.count - i;
      for (int64_t j = 0; j < rows; ++j)
        block.rows[i + j] = {(base + j * window_.panel_step_h) * window_.columns, (i + j) * window_.padded_width,
                             width_of(first + i + j)};
      base += window_.packed_rows(a_, rows);
      i += rows;
    }
    block.packed_rows = base;
  }

  // Strips of kTileK filters: [strip][row][pixel][kTileK], pixels in pairs where the arithmetic takes pairs. Pixels and
  // filters past the end are zero.
  template <class T>
  void pack_grad(const Block& block) const {
    constexpr int kPixels = Arithmetic::kPixels;
    const int64_t strip = strip_of(block);
    const int64_t filters = t_.k_end - t_.k_begin, whole = filters / kTileK;
    const T zeros[kTileK] = {};
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t width = block.rows[i].width;
      const T* source = static_cast<const T*>(a_.grad) + (block.first + i) * a_.out_width * a_.filters + t_.k_begin;
      for (int64_t p = 0; p < window_.padded_width; p += kPixels) {
        const T* one = p < width ? source + p * a_.filters : nullptr;
        const T* two = p + 1 < width ? source + (p + 1) * a_.filters : nullptr;
        Panel* to = static_cast<Panel*>(t_.grad_panels) + (block.rows[i].grad + p) * kTileK;
        for (int64_t q = 0; q < whole; ++q, to += strip)
          Arithmetic::pack_strip(to, one ? one + q * kTileK : zeros, two ? two + q * kTileK : zeros);
        if (whole < k_panels_) {
          T last[2][kTileK] = {};
          for (int64_t k = whole * kTileK; k < filters; ++k) {
            if (one) last[0][k - whole * kTileK] = one[k];
            if (two) last[1][k - whole * kTileK] = two[k];
          }
          Arithmetic::pack_strip(to, last[0], last[1]);
        }
      }
    }
  }

  // Panels of kTileC channels: [panel][packed row][column][kTileC], zeros outside of x.
  template <class T, class Act, bool kPending>
  void pack_x(const Block& block) const {
    int64_t packed = 0;
    for (int64_t i = 0; i < block.count;) {
      const int64_t row = block.first + i, oh = row % a_.out_height, sample = row / a_.out_height;
      const int64_t left = a_.out_height - oh;
      const int64_t rows = left < block.count - i ? left : block.count - i;
      const int64_t count = window_.packed_rows(a_, rows);
      for (int64_t j = 0; j < count; ++j, ++packed) {
        const int64_t ih = oh * a_.stride_h - a_.pad_h + j * window_.source_step_h;
        const bool inside = ih >= 0 && ih < a_.height;
        // A flat picture may end inside its last row.
        const int64_t width = a_.last_width == a_.out_width ? a_.width : width_of(row + j);
        const T* source = static_cast<const T*>(a_.x) + (sample * a_.height + ih) * a_.width * a_.channels;
        pack_row<T, Act, kPending>(inside ? source : nullptr, width, packed, block.packed_rows);
      }
      i += rows;
    }
  }

  template <class T, class Act, bool kPending>
  void pack_row(const T* source, int64_t width, int64_t packed, int64_t packed_rows) const {
    const Vec param(a_.act_param);
    const int64_t panel = panel_of(packed_rows);
    for (int64_t column = 0; column < window_.columns; ++column) {
      const int64_t iw = column * window_.source_step_w - a_.pad_w;
      const bool inside = source != nullptr && iw >= 0 && iw < width;
      Panel* to = static_cast<Panel*>(t_.x_panels) + (packed * window_.columns + column) * kTileC;
      const T* from = source + iw * a_.channels + t_.c_begin;
      const int64_t whole = inside ? (t_.c_end - t_.c_begin) / kTileC : 0;
      for (int64_t q = 0; q < whole; ++q, to += panel)
        for (int64_t lane = 0; lane < kTileC; lane += Vec::kWidth)
          pack_vector<T, Act, kPending>(to + lane, from + q * kTileC + lane, t_.c_begin + q * kTileC + lane, param);
      for (int64_t q = whole; q < c_panels_; ++q, to += panel)
        for (int64_t lane = 0; lane < kTileC; lane += Vec::kWidth) {
          const int64_t c = q * kTileC + lane, n = t_.c_end - t_.c_begin - c;
          if (inside && n >= Vec::kWidth)
            pack_vector<T, Act, kPending>(to + lane, from + c, t_.c_begin + c, param);
          else if (inside && n > 0)
            pack_value<Act, kPending>(to + lane, from + c, t_.c_begin + c, param, Tail{n});
          else
            Arithmetic::store_x(to + lane, Vec());
        }
    }
  }

  template <class T, class Act, bool kPending>
  FR_INLINE void pack_vector(Panel* to, const T* from, int64_t c, Vec param) const {
    if constexpr (!kPending && sizeof(T) == sizeof(Panel))
      std::memcpy(to, from, Vec::kWidth * sizeof(T));  // the same bits
    else
      pack_value<Act, kPending>(to, from, c, param, Whole{});
  }

  // One vector of the value that the convolution read, in x's dtype.
  template <class Act, bool kPending, class T, class Extent>
  FR_INLINE void pack_value(Panel* to, const T* x, int64_t c, Vec param, Extent extent) const {
    Vec value = load(x, extent);
    if constexpr (kPending) {
      value = Act::forward(fma(value, load(a_.scale + c, extent), load(a_.shift + c, extent)), param);
      if constexpr (sizeof(T) < sizeof(Panel)) {
        T rounded[Vec::kWidth];
        store(rounded, value);
        value = load(rounded);
      }
    }
    Arithmetic::store_x(to, value);
  }

  template <class T>
  void accumulate(const Block& block) const {
    const int64_t x_panel = panel_of(block.packed_rows), grad_strip = strip_of(block);
    float* sums = t_.sums;
    NextRows<T> next(a_, t_, block.first + block.count, c_panels_ * k_panels_ * a_.kernel_h * a_.kernel_w);
    for (int64_t q = 0; q < c_panels_; ++q)
      for (int64_t r = 0; r < a_.kernel_h; ++r)
        for (int64_t s = 0; s < a_.kernel_w; ++s) {
          const int64_t tap = r * a_.dilation_h * window_.columns + s * a_.dilation_w;
          for (int64_t k = 0; k < k_panels_; ++k, sums += kTileK * kTileC) {
            next.prefetch();
            Arithmetic::tile(static_cast<const Panel*>(t_.x_panels) + q * x_panel, window_.panel_step_w,
                             static_cast<const Panel*>(t_.grad_panels) + k * grad_strip, block.rows, block.count, tap,
                             block.first == 0, sums);
          }
        }
  }

  template <class T>
  void write_out() const {
    const int64_t taps = a_.kernel_h * a_.kernel_w;
    for (int64_t k = t_.k_begin; k < t_.k_end; ++k)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t q = 0; q < c_panels_; ++q) {
          const int64_t c = t_.c_begin + q * kTileC, n = t_.c_end - c < kTileC ? t_.c_end - c : kTileC;
          float row[kTileC];
          Arithmetic::ordered(t_.sums + ((q * taps + tap) * k_panels_ * kTileK + (k - t_.k_begin)) * kTileC, row);
          T* to = static_cast<T*>(a_.out) + k * a_.out_stride_k + c * a_.out_stride_c +
                  tap / a_.kernel_w * a_.out_stride_h + tap % a_.kernel_w * a_.out_stride_w;
          if (a_.out_stride_c == 1)
            for_each_vector(n, [&](int64_t i, auto extent) { store(to + i, load(row + i, extent), extent); });
          else
            for (int64_t i = 0; i < n; ++i) to[i * a_.out_stride_c] = from_float<T>(row[i]);
        }
  }
};

template <class Arithmetic, class T>
FR_INLINE void run_wgrad(const WgradArgs& args, const WgradTask& task) {
  WgradBody<Arithmetic> body(args, task);
  if (!args.pending) return body.template run<T, Identity, false>();
  dispatch_activation(args.act, [&](auto act) { body.template run<T, decltype(act), true>(); });
}

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres
