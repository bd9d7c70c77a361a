// The prologues of grouped convolutions: how patches of pixels come into shared memory, with the affine and the
// activation, or a norm's input gradient, applied on the way; and how weights are packed for the products.
#pragma once

#include "cuda/conv_plan.h"
#include "cuda/join.h"

namespace fusedres {
namespace {

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------------------
// Sources: what is copied to shared memory as it is, and what becomes of it there
// ---------------------------------------------------------------------------------------------------------------------

// z = act(scale x + shift), rounded as a convolution of its own would read it.
struct Pending {
  Input x;
  Norm norm;
  int channels;
  int64_t act;
  float act_param;

  __host__ __device__ __forceinline__ bool plain() const { return norm.rows == nullptr && act == Identity::kCode; }
  __device__ __forceinline__ Input first() const { return x; }
  __device__ __forceinline__ Input second() const { return {nullptr, 0}; }

  template <class T>
  struct Column {
    using Elements = Pack<T, kVectorWidth<T>>;
    const Pending& of;
    float scale[kVectorWidth<T>], shift[kVectorWidth<T>];

    __device__ __forceinline__ Column(const Pending& of, int channel) : of(of) {
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) {
        scale[i] = of.norm.scale(of.channels, channel + i);
        shift[i] = of.norm.shift(of.channels, channel + i);
      }
    }
    __device__ __forceinline__ Elements value(const Elements& x, const Elements&) const {
      Elements out;
#pragma unroll
      for (int half = 0; half < kVectorWidth<T>; half += 4)  // more at once would not fit into the registers
        dispatch_activation(of.act, [&](auto act) {
#pragma unroll
          for (int i = half; i < half + 4; ++i)
            out.lane[i] =
                from_float<T>(decltype(act)::forward(fmaf(scale[i], to_float(x.lane[i]), shift[i]), of.act_param));
        });
      return out;
    }
  };
};

// dy = scale g - slope (y - mean) - offset, from the rows (scale, slope, mean, offset); g itself without rows.
struct OutputGradient {
  Input g, y;
  const float* rows;
  int channels;

  __host__ __device__ __forceinline__ bool plain() const { return rows == nullptr; }
  __device__ __forceinline__ Input first() const { return g; }
  __device__ __forceinline__ Input second() const { return y; }

  template <class T>
  struct Column {
    using Elements = Pack<T, kVectorWidth<T>>;
    float scale[kVectorWidth<T>], slope[kVectorWidth<T>], mean[kVectorWidth<T>], offset[kVectorWidth<T>];

    __device__ __forceinline__ Column(const OutputGradient& of, int channel) {
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) {
        const float* row = of.rows + channel + i;
        scale[i] = of.rows == nullptr ? 1.f : row[0];
        slope[i] = of.rows == nullptr ? 0.f : row[of.channels];
        mean[i] = of.rows == nullptr ? 0.f : row[2 * of.channels];
        offset[i] = of.rows == nullptr ? 0.f : row[3 * of.channels];
      }
    }
    __device__ __forceinline__ Elements value(const Elements& g, const Elements& y) const {
      Elements out;
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) {
        const float between = to_float(y.lane[i]) - mean[i];
        out.lane[i] = from_float<T>(fmaf(scale[i], to_float(g.lane[i]), -fmaf(slope[i], between, offset[i])));
      }
      return out;
    }
  };
};

// ---------------------------------------------------------------------------------------------------------------------
// Patches
// ---------------------------------------------------------------------------------------------------------------------

// Pixels of some images, of which those outside the tensor count as zero.
struct Region {
  int images, h, w;
  int image, top, left;  // its first
  int all_images;
  Extent all;

  __device__ __forceinline__ int pixels() const { return images * h * w; }

  // The pixel in the tensor, or -1 outside.
  __device__ __forceinline__ int64_t pixel(int n, int y, int x) const {
    n += image;
    y += top;
    x += left;
    const bool inside = n < all_images && y >= 0 && y < all.h && x >= 0 && x < all.w;
    return inside ? (int64_t{n} * all.h + y) * all.w + x : -1;
  }
};

// Goes through a region `step` pixels at a time, without a division per pixel.
struct RegionWalk {
  const Region& region;
  int n, y, x;
  int rows, columns;  // of a step

  __device__ __forceinline__ RegionWalk(const Region& region, int start, int step)
      : region(region),
        n(start / region.w / region.h),
        y(start / region.w % region.h),
        x(start % region.w),
        rows(step / region.w),
        columns(step % region.w) {}

  __device__ __forceinline__ int64_t pixel() const { return region.pixel(n, y, x); }
  __device__ __forceinline__ void next() {
    x += columns;
    y += rows;
    if (x >= region.w) {
      x -= region.w;
      ++y;
    }
    while (y >= region.h) {
      y -= region.h;
      ++n;
    }
  }
};

// A tile's place: its first image and pixel of the class grid.
struct TilePlace {
  int image, top, left;

  static __device__ __forceinline__ TilePlace of(const ConvPlan& p, int64_t tile) {
    const int per_image = p.tiles.h * p.tiles.w, rest = static_cast<int>(tile % per_image);
    return {static_cast<int>(tile / per_image) * p.tile_images, rest / p.tiles.w * p.tile.h,
            rest % p.tiles.w * p.tile.w};
  }
  // What the tile reads.
  __device__ __forceinline__ Region patch(const ConvPlan& p) const {
    return {p.tile_images, p.patch.h, p.patch.w, image, top * p.in_step.h + p.origin.h, left * p.in_step.w + p.origin.w,
            p.images,      p.in};
  }
};

template <class T, int kWidth>
__device__ __forceinline__ bool all_finite(const Pack<T, kWidth>& pack) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) finite = finite && isfinite(to_float(pack.lane[i]));
  return finite;
}

// Where a thread's part of a region goes: always the same channels, of every `step`th pixel from `start` on.
template <class T>
struct FillPlace {
  int column, start, step;

  __device__ __forceinline__ explicit FillPlace(int span) {
    const int columns = span / kVectorWidth<T>;
    column = static_cast<int>(threadIdx.x) % columns * kVectorWidth<T>;
    step = kConvThreads / columns;
    start = static_cast<int>(threadIdx.x) / columns;
  }
  __device__ __forceinline__ bool takes_part() const { return start < step; }
};

// Starts to copy `span` channels from `first` on of a region's pixels to shared memory, all at once.
template <class T>
__device__ __forceinline__ void start_fill(const Input& from, int channels, const Region& region, int first, int span,
                                           char* to, int pitch) {
  const FillPlace<T> place(span);
  const int channel = first + place.column, pixels = region.pixels();
  if (!place.takes_part()) return;
  RegionWalk walk(region, place.start, place.step);
  for (int i = place.start; i < pixels; i += place.step, walk.next()) {
    T* target = reinterpret_cast<T*>(to + i * pitch) + place.column;
    const int64_t pixel = channel < channels ? walk.pixel() : -1;
    if (pixel >= 0)
      copy_async(target, static_cast<const T*>(from.data) + pixel * from.pitch + channel);
    else
      *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
  }
}

// Waits for what this thread has started and makes of it what the source says, in place. With `watch`, whether a value
// was not finite.
template <class T, class Source>
__device__ __forceinline__ bool finish_fill(const Source& source, const Region& region, int first, int span, char* to,
                                            const char* side, int pitch, bool watch) {
  wait_for_copies();
  if (source.plain() && !watch) return false;
  using Elements = Pack<T, kVectorWidth<T>>;
  const FillPlace<T> place(span);
  const int channel = first + place.column, pixels = region.pixels();
  bool odd = false;
  if (!place.takes_part() || channel >= source.channels) return odd;
  const typename Source::template Column<T> column(source, channel);
  RegionWalk walk(region, place.start, place.step);
#pragma unroll 1
  for (int i = place.start; i < pixels; i += place.step, walk.next()) {
    if (walk.pixel() < 0) continue;
    T* target = reinterpret_cast<T*>(to + i * pitch) + place.column;
    Elements value = Elements::load(target);
    if (!source.plain()) {
      const auto other =
          side == nullptr ? value : Elements::load(reinterpret_cast<const T*>(side + i * pitch) + place.column);
      value = column.value(value, other);
      value.store(target);
    }
    if (watch) odd = odd || !all_finite(value);
  }
  return odd;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights
// ---------------------------------------------------------------------------------------------------------------------

// The weight that takes channel `in` to channel `out`, over one tap; zero between groups.
struct Weights {
  const void* data;
  int64_t out_stride, in_stride, row_stride, column_stride;  // of [K, C / groups, R, S], as the pass sees its channels
  int kernel_w;
  bool transposed;  // dgrad: the tensor's K is what the pass reads

  template <class T>
  __device__ __forceinline__ T get(const ConvPlan& p, int out, int in, int index) const {
    const int group = out / p.group_out;
    if (in / p.group_in != group) return from_float<T>(0.f);
    const int64_t o = transposed ? out - group * p.group_out : out, i = transposed ? in : in - group * p.group_in;
    const int64_t at =
        o * out_stride + i * in_stride + index / kernel_w * row_stride + index % kernel_w * column_stride;
    return static_cast<const T*>(data)[at];
  }
};

// The sum over taps and channels of a group, in steps of 16 for the matrix instruction: two chunks of 8 channels each,
// which may belong to different taps. Groups of 4 share a chunk with their neighbour.
struct MatrixSteps {
  int chunks;                   // per tap
  int first[kMostClasses + 1];  // of a class

  static MatrixSteps of(const ConvPlan& p) {
    MatrixSteps s{};
    s.chunks = static_cast<int>(ceil_div(p.group_in, 8));
    for (int c = 0; c < p.classes(); ++c)
      s.first[c + 1] = s.first[c] + static_cast<int>(ceil_div((p.taps.first[c + 1] - p.taps.first[c]) * s.chunks, 2));
    return s;
  }
  __host__ __device__ __forceinline__ int count(int c) const { return first[c + 1] - first[c]; }
};

// As mma.m16n8k16 reads its second operand: two words per lane, [class][8 outputs][step][lane].
template <class T>
__global__ void __launch_bounds__(kConvThreads)
    conv_pack_fragments_kernel(const ConvPlan p, const MatrixSteps steps, const Weights weights, T* to) {
  const int outputs = p.out_channels / 8;
  const int64_t all = int64_t{steps.first[p.classes()]} * outputs * 32;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < all; at += int64_t{gridDim.x} * blockDim.x) {
    const int lane = static_cast<int>(at % 32), row = static_cast<int>(at / 32);
    int c = 0;
    while (row >= steps.first[c + 1] * outputs) ++c;
    const int count = steps.count(c), local = row - steps.first[c] * outputs;
    const int out = local / count * 8 + lane / 4;
    const int begin = local / count * 8 / p.group_out * p.group_in;
    Pack<T, 4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = local % count * 2 + i / 2, tap = p.taps.first[c] + chunk / steps.chunks;
      const int in = begin + chunk % steps.chunks * 8 + lane % 4 * 2 + i % 2;
      words.lane[i] = tap < p.taps.first[c + 1] ? weights.get<T>(p, out, in, p.taps.index[tap]) : from_float<T>(0.f);
    }
    words.store(to + at * 4);
  }
}

// In float, [tap][output][channel of its group], the taps of all classes one after the other.
template <class T>
__global__ void __launch_bounds__(kConvThreads)
    conv_pack_rows_kernel(const ConvPlan p, const Weights weights, float* to) {
  const int64_t all = int64_t{p.all_taps()} * p.out_channels * p.group_in;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < all; at += int64_t{gridDim.x} * blockDim.x) {
    const int out = static_cast<int>(at / p.group_in % p.out_channels);
    const int tap = static_cast<int>(at / p.group_in / p.out_channels);
    const int in = out / p.group_out * p.group_in + static_cast<int>(at % p.group_in);
    to[at] = to_float(weights.get<T>(p, out, in, p.taps.index[tap]));
  }
}

}  // namespace
}  // namespace fusedres
