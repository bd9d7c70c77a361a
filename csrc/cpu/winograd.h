// A convolution with 3x3 taps of step one, in float32, by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray
// 2016, "Fast algorithms for convolutional neural networks", section 4.1): 16 products for four results instead of 36.
//
//   result = A^T [ (G w G^T) * (B^T d B) ] A         d: a 4x4 window of the source, result: the 2x2 pixels in its
//   middle
//
// summed over channels, which makes a matrix product for each of the 16 points. A block of tiles goes through all three
// steps while it is in a core's cache. What the source is, and what becomes of the result, is read and written on the
// way; see fusedres/ops/conv_fused.py, conv_fused_backward.py and conv_winograd.py.
//
// The transforms mix neighbouring pixels, so a NaN or an infinity would spread to results that do not see it. A tile
// with a result that is not finite is therefore computed once more, from the definition.
#pragma once

#include "cpu/bn_stats.h"
#include "cpu/types.h"

namespace fusedres {

constexpr int64_t kPoints = 16;
constexpr int64_t kPanel = 32;  // filters in a panel of transformed weights

// Between rows of the transformed tensors: a cache line more than they hold, and whole vectors.
constexpr int64_t winograd_pitch(int64_t channels) { return (channels + kPanel - 1) / kPanel * kPanel + 16; }

// A float32 tensor, in channels_last or a slice of such a tensor's channels.
struct Pixels {
  const float* data;
  int64_t pitch;  // between pixels
};

enum class WinogradSource : int {
  kPlain,
  kPending,   // act(scale x + shift)
  kGradient,  // scale g - slope (y - mean) - offset
};
enum class WinogradResult : int {
  kStatistics,  // result + bias, and its statistics where partials are given
  kJoin,        // act(result + bias + residual)
  kGradient,    // g = (result + addend) act'(scale x + shift), and the sums of g and g (x - mean) where room is given
};

struct WinogradArgs {
  int64_t channels, height, width;
  int64_t filters, out_height, out_width;
  int64_t pad_h, pad_w;
  int64_t tile_rows, tile_columns, tiles;  // tiles: of all samples
  const float* weights;                    // [panel][point][channel][kPanel], or with taps in place of points
  bool taps;                               // weights that are not finite are not transformed

  WinogradSource source;
  int64_t act;
  float act_param;
  Pixels x, y;
  const float *scale, *shift;          // kPending
  const float *slope, *mean, *offset;  // kGradient, with scale

  WinogradResult result;
  int64_t out_act;
  float out_act_param;
  float* out;
  int64_t out_pitch;
  const float* bias;  // or null
  Pixels residual;    // or the addend, or null
  Pixels pending;     // x of kGradient, and its rows
  const float *out_mean, *out_scale, *out_shift;
  bool statistics;
  StatsPartials partials;  // of kStatistics, a row for every block
  float* sums;             // of kGradient, [2][blocks][filters]
  int64_t blocks;
};

// Tiles [first, first + count) as number `block`, filters [k_begin, k_end), of which the first begins a panel.
struct WinogradTask {
  int64_t block, first, count, k_begin, k_end;
  float *window, *products;  // room for the transformed tiles, [point][tile][winograd_pitch]
};

// Transforms the weights of panels [begin, end) and says whether all of them are finite; element (k, c, r, s) is at
// data[k filter + c channel + r row + s column].
struct WinogradPackArgs {
  const float* data;
  int64_t filter, channel, row, column;
  int64_t filters, channels;
  bool taps;
  float* packed;
};

// The weight gradient by the same filtering:
//
//   dW = G^T [ sum over tiles of (A dy A^T) * (B^T d B) ] G        dy: the gradient of a tile's 2x2 results
//
// A task has filters [k_begin, k_end) and channels [c_begin, c_end) to itself, all tiles, and room for a block of
// transformed windows and gradients, [point][tile][winograd_pitch], and for the sums, [point][filter][winograd_pitch].
struct WinogradWgradArgs {
  WinogradArgs conv;  // what the source is, and the geometry
  Pixels grad;
  float* out;  // of any strides, in elements
  int64_t out_stride_k, out_stride_c, out_stride_h, out_stride_w;
};

struct WinogradWgradTask {
  int64_t k_begin, k_end, c_begin, c_end;
  float *window, *grads, *sums;
};

constexpr int64_t kWgradTiles = 56;  // of a block: what it makes stays in a core's cache, and no result depends on more

constexpr int64_t winograd_panel_size(int64_t channels) { return kPoints * channels * kPanel; }

}  // namespace fusedres

FR_DECLARE_FOR_EACH_ISA(void winograd_task(const WinogradArgs& args, const WinogradTask& task))
FR_DECLARE_FOR_EACH_ISA(bool winograd_pack(const WinogradPackArgs& args, int64_t begin, int64_t end))
// Says whether all that was written is finite.
FR_DECLARE_FOR_EACH_ISA(bool winograd_wgrad_task(const WinogradWgradArgs& args, const WinogradWgradTask& task))
