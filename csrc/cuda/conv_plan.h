// What a grouped convolution's launch is: taps, tiles of pixels, blocks of channels; decided on the host.
//
// One description serves both directions. A convolution reads `in` and writes `out`; out's pixels fall into classes
// that meet the same taps: one class for fprop, stride * stride of them for dgrad, whose taps are those that the stride
// lets through (Dumoulin and Visin 2016, "A guide to convolution arithmetic", section 4). Pixel (u, v) of class (i, j)
// is out's (u * out_step + i, v * out_step + j), and its taps are in's (u, v) * in_step + offset.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace fusedres {
namespace {

constexpr int kConvThreads = 256;
constexpr int kConvWarps = kConvThreads / 32;
constexpr int kWarpPixels = 32;    // of a warp's tile
constexpr int kWarpChannels = 32;  // of a warp's tile
constexpr int kMostTaps = 64;
constexpr int kMostClasses = 16;
constexpr int kMostBlock = 64;                  // channels that a block computes
constexpr int kStagePitch = kWarpChannels + 8;  // elements; rows eight apart share no bank
constexpr int kChunkBytes = 16;                 // what one lane reads of a pixel

// The taps of all classes, one class after the other.
struct Taps {
  int first[kMostClasses + 1];
  int down[kMostTaps], right[kMostTaps];  // from the patch's first pixel
  int index[kMostTaps];                   // r * S + s
};

struct Extent {
  int h, w;
};

struct ConvPlan {
  int images;
  Extent in, out;  // pixels of the tensors
  Extent grid;     // pixels of a class
  Extent in_step, out_step;
  Extent origin;  // the patch's first pixel relative to in_step * (the tile's first)
  Extent reach;   // a single pixel's patch
  Extent tile, patch;
  int tile_images;
  Extent tiles;  // per image
  int64_t all_tiles;

  int in_channels, out_channels;
  int group_in, group_out;
  int block;   // channels of `out` per block of threads, a multiple of 8
  int span;    // channels of `in` that these need
  int blocks;  // of channels
  int pitch;   // bytes from pixel to pixel in shared memory
  Taps taps;

  __host__ __device__ __forceinline__ int classes() const { return out_step.h * out_step.w; }
  __host__ __device__ __forceinline__ int tile_pixels() const { return tile_images * tile.h * tile.w; }
  __host__ __device__ __forceinline__ int patch_pixels() const { return tile_images * patch.h * patch.w; }
  __host__ __device__ __forceinline__ int patch_bytes() const { return patch_pixels() * pitch; }
  __host__ __device__ __forceinline__ int warp_columns() const { return block > kWarpChannels ? 2 : 1; }
  __host__ __device__ __forceinline__ int all_taps() const { return taps.first[classes()]; }
  __host__ __device__ __forceinline__ int first_input(int first_output) const {
    return first_output / group_out * group_in;
  }
};

struct ConvShape {
  int images;
  Extent in, out;  // of the convolution itself: H x W to P x Q
  int channels, filters, groups;
  Extent kernel, stride, padding, dilation;
};

// ---------------------------------------------------------------------------------------------------------------------
// Taps
// ---------------------------------------------------------------------------------------------------------------------

inline ConvPlan fprop_plan(const ConvShape& s) {
  ConvPlan p{};
  p.images = s.images;
  p.in = s.in;
  p.out = p.grid = s.out;
  p.in_step = s.stride;
  p.out_step = {1, 1};
  p.origin = {-s.padding.h, -s.padding.w};
  p.reach = {(s.kernel.h - 1) * s.dilation.h + 1, (s.kernel.w - 1) * s.dilation.w + 1};
  p.in_channels = s.channels;
  p.out_channels = s.filters;
  p.group_in = s.channels / s.groups;
  p.group_out = s.filters / s.groups;
  int count = 0;
  for (int r = 0; r < s.kernel.h; ++r)
    for (int t = 0; t < s.kernel.w; ++t) {
      p.taps.down[count] = r * s.dilation.h;
      p.taps.right[count] = t * s.dilation.w;
      p.taps.index[count++] = r * s.kernel.w + t;
    }
  p.taps.first[1] = count;
  return p;
}

// Whether tap r meets input pixels = `phase` modulo the stride, and then which output pixel relative to theirs.
inline bool meets(int phase, int r, int stride, int padding, int dilation, int* offset) {
  const int distance = phase + padding - r * dilation;
  *offset = distance / stride;
  return distance % stride == 0;
}

inline ConvPlan dgrad_plan(const ConvShape& s) {
  ConvPlan p{};
  p.images = s.images;
  p.in = s.out;
  p.out = s.in;
  p.out_step = s.stride;
  p.in_step = {1, 1};
  p.grid = {(s.in.h + s.stride.h - 1) / s.stride.h, (s.in.w + s.stride.w - 1) / s.stride.w};
  p.in_channels = s.filters;
  p.out_channels = s.channels;
  p.group_in = s.filters / s.groups;
  p.group_out = s.channels / s.groups;
  int count = 0;
  for (int i = 0; i < s.stride.h; ++i)
    for (int j = 0; j < s.stride.w; ++j) {
      for (int r = 0; r < s.kernel.h; ++r)
        for (int t = 0; t < s.kernel.w; ++t) {
          int down = 0, right = 0;
          if (!meets(i, r, s.stride.h, s.padding.h, s.dilation.h, &down)) continue;
          if (!meets(j, t, s.stride.w, s.padding.w, s.dilation.w, &right)) continue;
          p.taps.down[count] = down;
          p.taps.right[count] = right;
          p.taps.index[count++] = r * s.kernel.w + t;
        }
      p.taps.first[i * s.stride.w + j + 1] = count;
    }
  p.reach = {1, 1};
  if (count == 0) return p;
  const auto downs = std::minmax_element(p.taps.down, p.taps.down + count);
  const auto rights = std::minmax_element(p.taps.right, p.taps.right + count);
  p.origin = {*downs.first, *rights.first};
  p.reach = {*downs.second - p.origin.h + 1, *rights.second - p.origin.w + 1};
  for (int t = 0; t < count; ++t) {
    p.taps.down[t] -= p.origin.h;
    p.taps.right[t] -= p.origin.w;
  }
  return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles and blocks
// ---------------------------------------------------------------------------------------------------------------------

struct Tiling {
  int element_size;
  int patches;          // tensors of which a block holds the patch
  int gradients;        // tensors of which it holds the tile itself; then also where the tile's pixels lie in the patch
  int64_t fixed_bytes;  // of shared memory, whatever the tile is
  int most_pixels;      // of a tile
  int64_t most_shared;
};

// Of a tile of the result's gradients, from pixel to pixel.
__host__ __device__ __forceinline__ int gradient_pitch(const ConvPlan& p, int element_size) {
  return p.block * element_size + kChunkBytes;
}

// Of where a tile's pixels lie in the patch: whole matrix instructions.
__host__ __device__ __forceinline__ int table_length(const ConvPlan& p) { return (p.tile_pixels() + 15) / 16 * 16; }

inline int64_t shared_bytes(const ConvPlan& p, const Tiling& t) {
  const int64_t gradients = int64_t{t.gradients} * p.tile_pixels() * gradient_pitch(p, t.element_size);
  const int64_t table = t.gradients == 0 ? 0 : table_length(p) * static_cast<int64_t>(sizeof(int));
  return int64_t{t.patches} * p.patch_bytes() + gradients + table + t.fixed_bytes;
}

// Bytes through a processor's memory pipes, and what a tile costs besides, in the same unit.
inline double cost(const ConvPlan& p, const Tiling& t) {
  const double loads =
      (double(p.patch_pixels()) * p.span * t.patches + double(p.tile_pixels()) * p.block * t.gradients) *
      t.element_size;
  const int64_t warps = ceil_div(p.tile_pixels(), kWarpPixels) * p.classes() * ceil_div(p.block, kWarpChannels);
  const double rounds = double(ceil_div(warps, kConvWarps));
  const double results = rounds * kConvWarps * kWarpPixels * kWarpChannels * t.element_size;
  constexpr double kPerTile = 16384;
  return (loads + 2 * results + kPerTile) * double(p.all_tiles) * p.blocks;
}

inline void set_tile(ConvPlan& p, int images, Extent tile) {
  p.tile_images = images;
  p.tile = tile;
  p.patch = {(tile.h - 1) * p.in_step.h + p.reach.h, (tile.w - 1) * p.in_step.w + p.reach.w};
  p.tiles = {static_cast<int>(ceil_div(p.grid.h, tile.h)), static_cast<int>(ceil_div(p.grid.w, tile.w))};
  p.all_tiles = ceil_div(p.images, images) * p.tiles.h * p.tiles.w;
}

inline void set_block(ConvPlan& p, int block, int element_size) {
  p.block = block;
  p.span = block < p.group_out ? p.group_in : block / p.group_out * p.group_in;
  p.blocks = static_cast<int>(ceil_div(p.out_channels, block));
  p.pitch = p.span * element_size + kChunkBytes;  // an odd number of chunks: neighbours lie in different banks
}

// The next smaller of the sizes that cut `whole` evenly: each is the least that still makes so many cuts.
inline int next_cut(int whole, int size) {
  if (size == 1) return 0;
  const int cuts = static_cast<int>(ceil_div(whole, size));
  for (int smaller = size - 1; smaller > 0; --smaller)
    if (ceil_div(whole, smaller) > cuts) return static_cast<int>(ceil_div(whole, ceil_div(whole, smaller)));
  return 0;
}

// Chooses block and tile: the cheapest of those that fit.
inline ConvPlan tiled(const char* op, ConvPlan p, const Tiling& t) {
  ConvPlan best{};
  double least = -1;
  const auto consider = [&] {
    const int64_t shared = shared_bytes(p, t);
    if (p.tile_pixels() > t.most_pixels || shared > t.most_shared) return false;
    // Two blocks to a processor: while one waits for memory, the other computes.
    constexpr double kAlone = 1.5;
    const double now = cost(p, t) * (2 * shared > t.most_shared ? kAlone : 1.);
    if (least < 0 || now < least) {
      least = now;
      best = p;
    }
    return true;
  };
  const int widest = std::min(kMostBlock, static_cast<int>(ceil_div(p.out_channels, 8) * 8));
  for (int block = widest; block >= 8; block -= 8) {
    if (block % p.group_out != 0 && p.group_out % block != 0) continue;
    set_block(p, block, t.element_size);
    for (int images = 2; images <= std::min(p.images, 8); ++images) {
      set_tile(p, images, p.grid);
      if (!consider()) break;
    }
    for (int h = p.grid.h; h > 0; h = next_cut(p.grid.h, h)) {
      if (h > t.most_pixels) continue;
      bool fits = false;
      for (int w = p.grid.w; w > 0 && !fits; w = next_cut(p.grid.w, w)) {
        set_tile(p, 1, {h, w});
        fits = consider();
      }
    }
  }
  STD_TORCH_CHECK(least >= 0, op, ": a kernel that reaches over ", p.reach.h, " x ", p.reach.w, " pixels of ",
                  p.group_in, " channels does not fit into shared memory");
  return best;
}

}  // namespace
}  // namespace fusedres
