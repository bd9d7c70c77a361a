// The weight gradient of grouped convolutions: a block keeps the sums of some filters over some taps in registers, and
// walks over tiles of pixels, whose patch of the input and whose gradients it brings to shared memory, each through its
// prologue. The pixels are split among blocks; a second kernel adds their partials in order.
//
//   MatrixWgrad  mma.sync: 16 rows are two chunks of 8 input channels, perhaps of different taps, 8 columns are
//   filters,
//                the depth is 16 pixels.
//   ScalarWgrad  float32 through FMA: a thread has 4 filters times 4 channels of one tap.
//   DepthWgrad   depthwise: a thread has 8 channels times some taps.
#pragma once

#include "cuda/conv_grouped.h"

namespace fusedres {
namespace {

// A block's shared memory: zeros of a chunk's size, the patch, the tile of gradients, and tables. As distances from its
// beginning, which take half the registers that addresses do.
struct WgradShared {
  char* zeros;
  int gradient_at, pixels_at, offsets_at;
  int gradient_pitch;

  __device__ __forceinline__ char* patch() const { return zeros + kChunkBytes; }
  // [pixel][filter of the block]
  __device__ __forceinline__ char* gradient() const { return zeros + gradient_at; }
  // Of the tile: where each lies in the patch, or -1.
  __device__ __forceinline__ int* pixels() const { return reinterpret_cast<int*>(zeros + pixels_at); }
  // MatrixWgrad: of its chunks in the patch, or -1.
  __device__ __forceinline__ int* offsets() const { return reinterpret_cast<int*>(zeros + offsets_at); }
};

// A block's part of the work.
struct WgradPart {
  int first, outputs;  // filters
  int slice;
};

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint2& to, unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to.x), "=r"(to.y)
               : "r"(row)
               : "memory");
}

// Where a partial of filter k, tap t and channel d of its group lies.
__device__ __forceinline__ int64_t weight_at(const ConvPlan& p, int k, int t, int d) {
  return (int64_t{k} * p.all_taps() + t) * p.group_in + d;
}

template <class T_>
struct MatrixWgrad {
  using T = T_;
  static constexpr int kRowTiles = 9;  // of a warp: 3x3 taps of 16 channels, or all of a kernel of 8
  static constexpr int kReduced = 0, kOffsets = 2 * kRowTiles;
  float sums[kRowTiles][4];

  static int slices(const ConvPlan& p) {
    return static_cast<int>(ceil_div(p.all_taps() * ceil_div(p.group_in, 8), 2 * kRowTiles));
  }

  __device__ __forceinline__ MatrixWgrad(const ConvPlan& p, const WgradPart& part, const WgradShared& shared) {
    const int i = static_cast<int>(threadIdx.x), per_tap = max(p.group_in / 8, 1);
    if (i < kOffsets) {
      const int chunk = chunk_of(part, i / 2, i % 2), tap = min(chunk / per_tap, p.all_taps() - 1);
      const int pixel = p.taps.down[tap] * p.patch.w + p.taps.right[tap];
      shared.offsets()[i] = chunk / per_tap == tap ? pixel * p.pitch + chunk % per_tap * kChunkBytes : -1;
    }
#pragma unroll
    for (auto& tile : sums)
#pragma unroll
      for (float& sum : tile) sum = 0;
  }

  static __device__ __forceinline__ int own_filter() { return static_cast<int>(threadIdx.x) / kWarpSize * 8; }
  static __device__ __forceinline__ int chunk_of(const WgradPart& part, int t, int half) {
    return 2 * (part.slice * kRowTiles + t) + half;
  }

  __device__ __forceinline__ void accumulate(const ConvPlan& p, const WgradPart& part, const WgradShared& shared) {
    if (own_filter() >= part.outputs) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int begin = p.first_input(part.first + own_filter()) - p.first_input(part.first);
    const unsigned patch = shared_address(shared.patch()) + begin * sizeof(T), zeros = shared_address(shared.zeros);
    const unsigned gradient = shared_address(shared.gradient()) + own_filter() * sizeof(T);
    const int chunks = p.all_taps() * max(p.group_in / 8, 1) - chunk_of(part, 0, 0);  // from the first on
#pragma unroll 1
    for (int first = 0; first < p.tile_pixels(); first += 16) {
      const int filter_row = first + lane % 16, row = shared.pixels()[first + lane / 16 * 8 + lane % 8];
      uint2 b;
      load_matrices_transposed(b,
                               shared.pixels()[filter_row] < 0 ? zeros : gradient + filter_row * shared.gradient_pitch);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        if (2 * t >= chunks) break;
        const int offset = shared.offsets()[2 * t + lane / 8 % 2];
        uint32_t a[4];
        load_matrices_transposed(a, row < 0 || offset < 0 ? zeros : patch + row + offset);
        multiply_add<T>(sums[t], a, b);
      }
    }
  }

  __device__ __forceinline__ void write(const ConvPlan& p, const WgradPart& part, float*, float* partials) const {
    if (own_filter() >= part.outputs) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, per_tap = max(p.group_in / 8, 1);
    const int k = part.first + own_filter() + lane % 4 * 2;
    const int channel = p.first_input(part.first + own_filter()) + lane / 4;
    const int before[2] = {channel - p.first_input(k), channel - p.first_input(k + 1)};
    float* const rows[2] = {partials + weight_at(p, k, 0, 0), partials + weight_at(p, k + 1, 0, 0)};
    int tap = chunk_of(part, 0, 0) / per_tap, within = chunk_of(part, 0, 0) % per_tap;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = before[i] + within * 8;
          if (tap < p.all_taps() && d >= 0 && d < p.group_in) rows[i][tap * p.group_in + d] = sums[t][2 * half + i];
        }
        if (++within == per_tap) {
          within = 0;
          ++tap;
        }
      }
  }
};

// Threads that share `units` among them, the rest of the block taking other pixels.
struct Units {
  int unit, turn, turns;  // turn < 0: none

  __device__ __forceinline__ Units(int units, int first, int all) {
    turns = kConvThreads / units;
    unit = first + static_cast<int>(threadIdx.x) % units;
    turn = static_cast<int>(threadIdx.x) / units;
    if (turn >= turns || unit >= all) turn = -1;
  }
};

// Adds what the threads of a unit have; the sum is that of turn 0.
template <int kSums>
__device__ __forceinline__ void add_turns(const Units& units, int count, int first, float* shared,
                                          float (&sums)[kSums]) {
  const int local = units.unit - first;
  if (units.turn > 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared[((units.turn - 1) * kSums + i) * count + local] = sums[i];
  }
  __syncthreads();
  if (units.turn != 0) return;
  for (int turn = 1; turn < units.turns; ++turn) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += shared[((turn - 1) * kSums + i) * count + local];
  }
}

struct ScalarWgrad {
  using T = float;
  static constexpr int kSums = 16;
  static constexpr int kReduced = kSums * kConvThreads, kOffsets = 0;
  float sums[kSums];
  Units units;
  int filter, channel, offset;  // in the block; in the patch; in bytes

  static __host__ __device__ int all(const ConvPlan& p) { return p.block / 4 * (p.group_in / 4) * p.all_taps(); }
  static int slices(const ConvPlan& p) { return static_cast<int>(ceil_div(all(p), kConvThreads)); }
  static __device__ __forceinline__ int per_slice(const ConvPlan& p) { return min(all(p), kConvThreads); }

  __device__ __forceinline__ ScalarWgrad(const ConvPlan& p, const WgradPart& part, const WgradShared&)
      : units(per_slice(p), part.slice * per_slice(p), all(p)) {
#pragma unroll
    for (float& sum : sums) sum = 0;
    filter = units.unit % (p.block / 4) * 4;
    if (filter >= part.outputs) units.turn = -1;
    const int rest = units.unit / (p.block / 4), tap = min(rest / (p.group_in / 4), p.all_taps() - 1);
    channel = rest % (p.group_in / 4) * 4;
    offset = (p.taps.down[tap] * p.patch.w + p.taps.right[tap]) * p.pitch +
             (p.first_input(part.first + filter) - p.first_input(part.first) + channel) * static_cast<int>(sizeof(T));
  }

  __device__ __forceinline__ void accumulate(const ConvPlan& p, const WgradPart&, const WgradShared& shared) {
    if (units.turn < 0) return;
    for (int i = units.turn; i < p.tile_pixels(); i += units.turns) {
      if (shared.pixels()[i] < 0) continue;
      const auto g =
          Pack<float, 4>::load(reinterpret_cast<const float*>(shared.gradient() + i * shared.gradient_pitch) + filter);
      const auto z = Pack<float, 4>::load(reinterpret_cast<const float*>(shared.patch() + shared.pixels()[i] + offset));
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] = fmaf(g.lane[k / 4], z.lane[k % 4], sums[k]);
    }
  }

  __device__ __forceinline__ void write(const ConvPlan& p, const WgradPart& part, float* shared, float* partials) {
    add_turns(units, per_slice(p), part.slice * per_slice(p), shared, sums);
    if (units.turn != 0) return;
    const int tap = units.unit / (p.block / 4) / (p.group_in / 4);
#pragma unroll
    for (int k = 0; k < kSums; k += 4)
      Pack<float, 4>{{sums[k], sums[k + 1], sums[k + 2], sums[k + 3]}}.store(
          partials + weight_at(p, part.first + filter + k / 4, tap, channel));
  }
};

template <class T_>
struct DepthWgrad {
  using T = T_;
  static constexpr int kTaps = 5;
  static constexpr int kSums = 8 * kTaps;
  static constexpr int kReduced = kSums * kConvThreads, kOffsets = 0;
  float sums[kSums];
  Units units;
  int channel, first_tap;

  static __host__ __device__ int all(const ConvPlan& p) { return p.block / 8 * ((p.all_taps() + kTaps - 1) / kTaps); }
  static int slices(const ConvPlan&) { return 1; }

  __device__ __forceinline__ DepthWgrad(const ConvPlan& p, const WgradPart& part, const WgradShared&)
      : units(all(p), 0, all(p)) {
#pragma unroll
    for (float& sum : sums) sum = 0;
    channel = units.unit % (p.block / 8) * 8;
    first_tap = units.unit / (p.block / 8) * kTaps;
    if (channel >= part.outputs) units.turn = -1;
  }

  static __device__ __forceinline__ void load(const char* from, float (&to)[8]) {
    constexpr int kWidth = kVectorWidth<T>;
#pragma unroll
    for (int i = 0; i < 8; i += kWidth) {
      const auto pack = Pack<T, kWidth>::load(reinterpret_cast<const T*>(from) + i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) to[i + k] = to_float(pack.lane[k]);
    }
  }

  __device__ __forceinline__ void accumulate(const ConvPlan& p, const WgradPart&, const WgradShared& shared) {
    if (units.turn < 0) return;
    int offset[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const int tap = min(first_tap + k, p.all_taps() - 1);
      offset[k] = (p.taps.down[tap] * p.patch.w + p.taps.right[tap]) * p.pitch + channel * static_cast<int>(sizeof(T));
    }
    for (int i = units.turn; i < p.tile_pixels(); i += units.turns) {
      if (shared.pixels()[i] < 0) continue;
      float g[8], z[8];
      load(shared.gradient() + i * shared.gradient_pitch + channel * sizeof(T), g);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        load(shared.patch() + shared.pixels()[i] + offset[k], z);
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[8 * k + c] = fmaf(g[c], z[c], sums[8 * k + c]);
      }
    }
  }

  __device__ __forceinline__ void write(const ConvPlan& p, const WgradPart& part, float* shared, float* partials) {
    add_turns(units, all(p), 0, shared, sums);
    if (units.turn != 0) return;
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (first_tap + k < p.all_taps())
          partials[weight_at(p, part.first + channel + c, first_tap + k, 0)] = sums[8 * k + c];
  }
};

struct WgradArgs {
  ConvPlan plan;
  Pending input;
  OutputGradient gradient;
  float* partials;  // [splits][filters][taps][channels of a group]
  int64_t length;   // of one split's
};

template <class Math>
__global__ void __launch_bounds__(kConvThreads, 2) conv_wgrad_kernel(const __grid_constant__ WgradArgs a) {
  using T = typename Math::T;
  extern __shared__ uint4 memory[];
  const ConvPlan& p = a.plan;
  const int first = static_cast<int>(blockIdx.x) % p.blocks * p.block, first_input = p.first_input(first);
  const WgradPart part{first, min(p.block, p.out_channels - first), static_cast<int>(blockIdx.x) / p.blocks};
  WgradShared shared;
  shared.gradient_pitch = gradient_pitch(p, sizeof(T));
  const int gradient_bytes = p.tile_pixels() * shared.gradient_pitch;
  shared.zeros = reinterpret_cast<char*>(memory);
  shared.gradient_at = kChunkBytes + p.patch_bytes();
  shared.pixels_at = shared.gradient_at + (a.gradient.plain() ? 1 : 2) * gradient_bytes;
  shared.offsets_at = shared.pixels_at + table_length(p) * static_cast<int>(sizeof(int));
  if (threadIdx.x == 0) memory[0] = make_uint4(0, 0, 0, 0);
  Math math(p, part, shared);
  for (int64_t t = blockIdx.y; t < p.all_tiles; t += gridDim.y) {
    const TilePlace place = TilePlace::of(p, t);
    const Region tile{p.tile_images, p.tile.h, p.tile.w, place.image, place.top, place.left, p.images, p.out};
    for (int i = static_cast<int>(threadIdx.x); i < table_length(p); i += kConvThreads) {
      const int row = i / p.tile.w, image = row / p.tile.h, u = row % p.tile.h, v = i % p.tile.w;
      const int in_patch = (image * p.patch.h + u * p.in_step.h) * p.patch.w + v * p.in_step.w;
      shared.pixels()[i] = i < p.tile_pixels() && tile.pixel(image, u, v) >= 0 ? in_patch * p.pitch : -1;
    }
    const Region patch = place.patch(p);
    char* side = a.gradient.plain() ? nullptr : shared.gradient() + gradient_bytes;
    start_fill<T>(a.input.x, a.input.channels, patch, first_input, p.span, shared.patch(), p.pitch);
    start_fill<T>(a.gradient.g, p.out_channels, tile, first, p.block, shared.gradient(), shared.gradient_pitch);
    if (side != nullptr) start_fill<T>(a.gradient.y, p.out_channels, tile, first, p.block, side, shared.gradient_pitch);
    finish_fill<T>(a.input, patch, first_input, p.span, shared.patch(), nullptr, p.pitch, false);
    finish_fill<T>(a.gradient, tile, first, p.block, shared.gradient(), side, shared.gradient_pitch, false);
    __syncthreads();
    math.accumulate(p, part, shared);
    __syncthreads();
  }
  math.write(p, part, reinterpret_cast<float*>(memory), a.partials + int64_t{blockIdx.y} * a.length);
}

// Adds the splits, each slice of threads its own in order, then the slices; `to` has any floating dtype and strides.
struct WeightTarget {
  ChannelVector to;
  int64_t strides[4];
  int kernel_w;
};

__global__ void __launch_bounds__(kWarpSize* kMergeSlices, 1)
    conv_wgrad_sum_kernel(const float* partials, int splits, int64_t length, int taps, int group_in,
                          const WeightTarget target) {
  const int64_t at = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  double sum = 0;
#pragma unroll 4
  for (int split = static_cast<int>(threadIdx.y); split < splits; split += static_cast<int>(blockDim.y))
    if (at < length) sum += partials[split * length + at];
  sum = sum_of_slices(sum);
  if (threadIdx.y != 0 || at >= length) return;
  const int64_t k = at / group_in / taps;
  const int d = static_cast<int>(at % group_in), tap = static_cast<int>(at / group_in % taps);
  target.to.set(k * target.strides[0] + d * target.strides[1] + tap / target.kernel_w * target.strides[2] +
                    tap % target.kernel_w * target.strides[3],
                sum);
}

}  // namespace
}  // namespace fusedres
