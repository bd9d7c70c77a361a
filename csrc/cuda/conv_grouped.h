// The kernel of grouped convolutions, for fprop and dgrad alike: a patch of the input goes to shared memory once,
// through its prologue; every warp then takes tiles of 32 pixels by 32 channels, sums over taps and the channels of a
// group, and hands 4 x 8 sums per lane to the epilogue. No pixel is gathered twice: a tap is another address in the
// patch.
//
// What differs by dtype and by channels per group is only how the sums come about:
//   MatrixMath  mma.sync; 16 pixels times 8 outputs, 16 deep. The 8 outputs read the chunks of their own group alone,
//   so
//               that nothing but groups of 4, two of which share a chunk, multiplies by zeros.
//   ScalarMath  float32 through FMA, exactly the products that there are.
//   DepthMath   depthwise, through FMA; a lane keeps 8 channels.
//
// Blocks take turns at the tiles, in an order that only the launch decides, and keep their channels' statistics in
// registers until the end: one partial per block, merged by a second kernel.
#pragma once

#include <vector>

#include "cuda/conv_load.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace fusedres {
namespace {

constexpr int kRows = 4, kColumns = 8;  // of a lane's sums
using Sums = float[kRows][kColumns];

// ---------------------------------------------------------------------------------------------------------------------
// Instructions
// ---------------------------------------------------------------------------------------------------------------------

// Between the steps of an unrolled loop: without it, the operands of all steps are loaded first, and do not fit into
// the registers.
__device__ __forceinline__ void one_at_a_time() { asm volatile("" ::: "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (__is_same(T, __half))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// ---------------------------------------------------------------------------------------------------------------------
// The sums of a warp's tile
// ---------------------------------------------------------------------------------------------------------------------

// A block's shared memory.
struct ConvShared {
  char* patch;
  char* zeros;  // kChunkBytes of them
  char* stage;  // of the warp
  int* steps;   // MatrixMath: where a chunk lies relative to a pixel's, or -1 where there is none
};

struct WarpTile {
  int c;             // the class
  int first_output;  // channel
  int outputs;       // channels of the block behind it, a multiple of 8
  int first_input;   // channel of the patch's first
  int patch_offset;  // of the lane's own pixel, in bytes; pixel i of the tile is lane i's
};

template <class T_, int kShare>
struct MatrixMath {
  using T = T_;
  static constexpr int kResident = 2;  // blocks of a processor at once
  MatrixSteps steps;
  const T* weights;
  bool halves;  // groups of 4: two share a chunk

  static __device__ __forceinline__ int row(int lane, int i) { return lane / 4 + 8 * i; }
  static __device__ __forceinline__ int column(int lane, int j) { return j / 2 * 8 + lane % 4 * 2 + j % 2; }

  int table_entries(const ConvPlan& p) const { return 2 * steps.first[p.classes()]; }

  __device__ __forceinline__ void prepare(const ConvPlan& p, int* table) const {
    for (int c = 0; c < p.classes(); ++c)
      for (int i = static_cast<int>(threadIdx.x); i < 2 * steps.count(c); i += kConvThreads) {
        const int tap = p.taps.first[c] + i / steps.chunks;
        const int pixel = p.taps.down[tap % kMostTaps] * p.patch.w + p.taps.right[tap % kMostTaps];
        table[2 * steps.first[c] + i] =
            tap < p.taps.first[c + 1] ? pixel * p.pitch + i % steps.chunks * kChunkBytes : -1;
      }
  }

  // Zero times infinity: where a value is not finite, groups that share a chunk take turns, each with the other's
  // channels out of sight.
  __device__ __forceinline__ int turns(bool odd) const { return halves && odd ? 2 : 1; }
  static __device__ __forceinline__ bool mine(int turns, int turn, int lane) {
    return turns == 1 || lane % 4 / 2 == turn;
  }

  __device__ __forceinline__ void accumulate(const ConvPlan& p, const ConvShared& shared, const WarpTile& tile,
                                             int lane, bool visible, Sums& sums) const {
    const int count = steps.count(tile.c);
    const int* table = shared.steps + 2 * steps.first[tile.c] + lane / 16;
    const int64_t first = int64_t{steps.first[tile.c]} * (p.out_channels / 8) + int64_t{tile.first_output / 8} * count;
    const uint2* packed = reinterpret_cast<const uint2*>(weights) + first * 32 + lane;
    const unsigned patch = shared_address(shared.patch), zeros = shared_address(shared.zeros);
    unsigned pixel[2], begin[4 / kShare];
#pragma unroll
    for (int t = 0; t < 2; ++t) pixel[t] = patch + __shfl_sync(kFullMask, tile.patch_offset, lane % 16 + 16 * t);
#pragma unroll
    for (int s = 0; s < 4 / kShare; ++s)
      begin[s] = (p.first_input(tile.first_output + s * kShare * 8) - tile.first_input) * sizeof(T);
    float d[2][4][4] = {};
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      const int offset = table[2 * step];
#pragma unroll
      for (int s = 0; s < 4 / kShare; ++s) {
        if (s * kShare * 8 >= tile.outputs) break;
        uint32_t a[2][4];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          load_matrices(a[t], offset < 0 ? zeros : pixel[t] + offset + begin[s]);
          if (kShare == 1 && !visible) a[t][0] = a[t][1] = a[t][2] = a[t][3] = 0;
        }
#pragma unroll
        for (int k = 0; k < kShare; ++k) {
          const int j = s * kShare + k;
          if (j * 8 >= tile.outputs) break;
          const uint2 b = packed[(j * count + step) * 32];
#pragma unroll
          for (int t = 0; t < 2; ++t) multiply_add<T>(d[t][j], a[t], b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = d[i / 2][j / 2][i % 2 * 2 + j % 2];
  }
};

// Groups of a multiple of 4 channels. A lane's two neighbouring outputs belong to one group.
struct ScalarMath {
  using T = float;
  static constexpr int kResident = 2;
  const float* weights;

  static __device__ __forceinline__ int row(int lane, int i) { return lane / 4 + 8 * i; }
  static __device__ __forceinline__ int column(int lane, int j) { return j / 2 * 8 + lane % 4 * 2 + j % 2; }

  int table_entries(const ConvPlan&) const { return 0; }
  __device__ __forceinline__ void prepare(const ConvPlan&, int*) const {}
  __device__ __forceinline__ int turns(bool) const { return 1; }
  static __device__ __forceinline__ bool mine(int, int, int) { return true; }

  __device__ __forceinline__ void accumulate(const ConvPlan& p, const ConvShared& shared, const WarpTile& tile,
                                             int lane, bool, Sums& sums) const {
    int pixel[kRows], begin[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) pixel[i] = __shfl_sync(kFullMask, tile.patch_offset, row(lane, i));
#pragma unroll
    for (int j = 0; j < kColumns; j += 2)
      begin[j / 2] = p.first_input(tile.first_output + column(lane, j)) - tile.first_input;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0;
#pragma unroll 1
    for (int tap = p.taps.first[tile.c]; tap < p.taps.first[tile.c + 1]; ++tap) {
      const int offset = (p.taps.down[tap] * p.patch.w + p.taps.right[tap]) * p.pitch;
      const float* row = weights + (int64_t{tap} * p.out_channels + tile.first_output) * p.group_in;
      for (int in = 0; in < p.group_in; in += 4) {
        Pack<float, 4> a[kRows];
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
          if (j * 4 >= tile.outputs) break;
          if (j == 0 || begin[j / 2] != begin[j / 2 - 1]) {
#pragma unroll
            for (int i = 0; i < kRows; ++i)
              a[i] = Pack<float, 4>::load(reinterpret_cast<const float*>(shared.patch + pixel[i] + offset) +
                                          begin[j / 2] + in);
          }
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const auto b = Pack<float, 4>::load(row + int64_t{column(lane, j + k)} * p.group_in + in);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
              for (int n = 0; n < 4; ++n) sums[i][j + k] = fmaf(a[i].lane[n], b.lane[n], sums[i][j + k]);
          }
        }
      }
    }
  }
};

template <class T_>
struct DepthMath {
  using T = T_;
  static constexpr int kResident = sizeof(T) < sizeof(float) ? 2 : 1;  // two blocks' registers would not do for float
  const float* weights;

  static __device__ __forceinline__ int row(int lane, int i) { return lane / 4 * 4 + i; }
  static __device__ __forceinline__ int column(int lane, int j) { return lane % 4 * 8 + j; }

  int table_entries(const ConvPlan&) const { return 0; }
  __device__ __forceinline__ void prepare(const ConvPlan&, int*) const {}
  __device__ __forceinline__ int turns(bool) const { return 1; }
  static __device__ __forceinline__ bool mine(int, int, int) { return true; }

  __device__ __forceinline__ void accumulate(const ConvPlan& p, const ConvShared& shared, const WarpTile& tile,
                                             int lane, bool, Sums& sums) const {
    constexpr int kWidth = kVectorWidth<T>;
    int pixel[kRows];
    const int at = tile.first_output - tile.first_input + column(lane, 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      pixel[i] = __shfl_sync(kFullMask, tile.patch_offset, row(lane, i)) + at * static_cast<int>(sizeof(T));
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0;
    }
    if (column(lane, 0) >= tile.outputs) return;
#pragma unroll 1
    for (int tap = p.taps.first[tile.c]; tap < p.taps.first[tile.c + 1]; ++tap) {
      const int offset = (p.taps.down[tap] * p.patch.w + p.taps.right[tap]) * p.pitch;
      const float* row = weights + int64_t{tap} * p.out_channels + tile.first_output + column(lane, 0);
      const Pack<float, 4> b[2] = {Pack<float, 4>::load(row), Pack<float, 4>::load(row + 4)};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        one_at_a_time();
#pragma unroll
        for (int j = 0; j < kColumns; j += kWidth) {
          const auto a = Pack<T, kWidth>::load(reinterpret_cast<const T*>(shared.patch + pixel[i] + offset) + j);
#pragma unroll
          for (int k = 0; k < kWidth; ++k)
            sums[i][j + k] = fmaf(to_float(a.lane[k]), b[(j + k) / 4].lane[(j + k) % 4], sums[i][j + k]);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// What epilogues share
// ---------------------------------------------------------------------------------------------------------------------

// A lane's share of its channels' statistics: a pair of numbers for each of its columns, of `count` values. Means are
// relative to the first value that the lane saw, so that a large mean costs a small variance nothing. They wait in
// shared memory, for sums and statistics together would not fit into the registers.
struct Totals {
  float* numbers;  // the thread's first; null where they are not wanted
  float count;

  static constexpr int kNumbers = 3 * kColumns;
  __device__ __forceinline__ float& a(int j) const { return numbers[3 * j * kConvThreads]; }
  __device__ __forceinline__ float& b(int j) const { return numbers[(3 * j + 1) * kConvThreads]; }
  __device__ __forceinline__ float& origin(int j) const { return numbers[(3 * j + 2) * kConvThreads]; }
};

// Mean and M2: Chan, Golub and LeVeque (1979), eq. 2.1.
struct MomentTotals {
  template <class F>
  static __device__ __forceinline__ void merge(F& mean, F& m2, F n_a, F other_mean, F other_m2, F n_b) {
    const F share = n_b > 0 ? n_b / (n_a + n_b) : F(0), delta = other_mean - mean;
    mean += delta * share;
    m2 += delta * delta * n_a * share + other_m2;
  }
};

struct SumTotals {
  template <class F>
  static __device__ __forceinline__ void merge(F& a, F& b, F, F other_a, F other_b, F) {
    a += other_a;
    b += other_b;
  }
};

// What an epilogue is given of a lane's tile.
template <class T>
struct EpilogueTile {
  T* stage[2];  // [kWarpPixels][kStagePitch]: operands; results go to the first
  int first_output, outputs, out_channels;
  bool valid_row[kRows];

  __device__ __forceinline__ float count() const {
    float count = 0;
#pragma unroll
    for (const bool valid : valid_row) count += valid ? 1.f : 0.f;
    return count;
  }
};

// Copies a warp's tile of a tensor to shared memory; `pixel` is that of the lane's own row.
template <class T>
__device__ __forceinline__ void stage_in(const Input& from, T* stage, int lane, int64_t pixel, int first, int outputs) {
  constexpr int kWidth = kVectorWidth<T>, kAcross = kWarpChannels / kWidth;
#pragma unroll 4
  for (int i = 0; i < kAcross; ++i) {
    const int row = lane / kAcross + i * (kWarpSize / kAcross), column = lane % kAcross * kWidth;
    const int64_t p = __shfl_sync(kFullMask, pixel, row);
    if (p >= 0 && column < outputs)
      copy_async(stage + row * kStagePitch + column,
                 static_cast<const T*>(from.data) + p * from.pitch + first + column);
  }
}

template <class T>
__device__ __forceinline__ void stage_out(const Output& to, const T* stage, int lane, int64_t pixel, int first,
                                          int outputs) {
  constexpr int kWidth = kVectorWidth<T>, kAcross = kWarpChannels / kWidth;
#pragma unroll 4
  for (int i = 0; i < kAcross; ++i) {
    const int row = lane / kAcross + i * (kWarpSize / kAcross), column = lane % kAcross * kWidth;
    const int64_t p = __shfl_sync(kFullMask, pixel, row);
    if (p >= 0 && column < outputs)
      to.store(p, first + column, Pack<T, kWidth>::load(stage + row * kStagePitch + column));
  }
}

// Rounds two neighbouring channels, to shared memory and in place.
template <class Math, class T>
__device__ __forceinline__ void round_to_stage(const EpilogueTile<T>& tile, int lane, int column,
                                               float (&value)[kRows][2]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (!tile.valid_row[i]) continue;
    const Pack<T, 2> rounded{{from_float<T>(value[i][0]), from_float<T>(value[i][1])}};
    rounded.store(tile.stage[0] + Math::row(lane, i) * kStagePitch + column);
    value[i][0] = to_float(rounded.lane[0]);
    value[i][1] = to_float(rounded.lane[1]);
  }
}

// A column's numbers of all lanes that have it, for the first four lanes; `count` is the lane's own.
template <class Merge>
__device__ __forceinline__ double merge_across_rows(double& a, double& b, double count) {
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2) {
    const double other_a = __shfl_down_sync(kFullMask, a, offset), other_b = __shfl_down_sync(kFullMask, b, offset);
    const double n = __shfl_down_sync(kFullMask, count, offset);
    Merge::merge(a, b, count, other_a, other_b, n);
    count += n;
  }
  return count;
}

// Partials of all blocks: [part][2][channels], and the values that each is of.
struct Partials {
  double* numbers;  // null: not wanted
  double* counts;
};

// ---------------------------------------------------------------------------------------------------------------------
// The kernel
// ---------------------------------------------------------------------------------------------------------------------

template <class Math, class Source, class Epilogue>
struct ConvArgs {
  ConvPlan plan;
  Math math;
  Source source;
  Epilogue epilogue;
  Output out;
  Partials partials;
};

// Merges the warps' totals in order and writes the block's. Its shared memory is that of the patch.
constexpr int kTotalsStride = 2 * kWarpChannels + 1;  // of a warp's

template <class Math, class Epilogue>
__device__ __forceinline__ void write_partials(const ConvPlan& p, const Partials& partials, double* shared, int first,
                                               const Totals& totals) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  __syncthreads();  // the patch is no longer read
#pragma unroll 1
  for (int j = 0; j < kColumns; ++j) {
    double a = static_cast<double>(totals.origin(j)) + totals.a(j), b = totals.b(j);
    const double count = merge_across_rows<typename Epilogue::Merge>(a, b, totals.count);
    if (lane >= 4) continue;
    shared[warp * kTotalsStride + Math::column(lane, j)] = a;
    shared[warp * kTotalsStride + kWarpChannels + Math::column(lane, j)] = b;
    if (lane == 0) shared[warp * kTotalsStride + 2 * kWarpChannels] = count;
  }
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x), columns = p.warp_columns();
  if (c >= p.block || first + c >= p.out_channels) return;
  const double* mine = shared + c / kWarpChannels * kTotalsStride;
  double a = mine[c % kWarpChannels], b = mine[kWarpChannels + c % kWarpChannels], n = mine[2 * kWarpChannels];
  for (int w = c / kWarpChannels + columns; w < kConvWarps; w += columns) {
    const double* other = shared + w * kTotalsStride;
    const double m = other[2 * kWarpChannels];
    Epilogue::Merge::merge(a, b, n, other[c % kWarpChannels], other[kWarpChannels + c % kWarpChannels], m);
    n += m;
  }
  const int64_t part = blockIdx.y;
  partials.numbers[2 * part * p.out_channels + first + c] = a;
  partials.numbers[(2 * part + 1) * p.out_channels + first + c] = b;
  if (first + c == 0) partials.counts[part] = n;
}

template <class Math, class Source, class Epilogue>
__global__ void __launch_bounds__(kConvThreads, Math::kResident)
    conv_grouped_kernel(const __grid_constant__ ConvArgs<Math, Source, Epilogue> a) {
  using T = typename Math::T;
  extern __shared__ uint4 memory[];
  constexpr int kStage = kWarpPixels * kStagePitch * static_cast<int>(sizeof(T));
  const ConvPlan& p = a.plan;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int first = static_cast<int>(blockIdx.x) * p.block, first_input = p.first_input(first);
  const int columns = p.warp_columns(), items = static_cast<int>(ceil_div(p.tile_pixels(), kWarpPixels));
  ConvShared shared;
  shared.patch = reinterpret_cast<char*>(memory);
  char* side = a.source.second().data == nullptr ? nullptr : shared.patch + p.patch_bytes();
  shared.zeros = shared.patch + (side == nullptr ? 1 : 2) * p.patch_bytes();
  shared.stage = shared.zeros + kChunkBytes + warp * Epilogue::kStaged * kStage;
  shared.steps = reinterpret_cast<int*>(shared.zeros + kChunkBytes + kConvWarps * Epilogue::kStaged * kStage);
  if (threadIdx.x == 0) *reinterpret_cast<uint4*>(shared.zeros) = make_uint4(0, 0, 0, 0);
  Totals totals{nullptr, 0.f};
  if (a.partials.numbers != nullptr) {
    totals.numbers = reinterpret_cast<float*>(shared.zeros + kChunkBytes + kConvWarps * Epilogue::kStaged * kStage);
    totals.numbers += threadIdx.x;
    shared.steps += Totals::kNumbers * kConvThreads;
    for (int i = 0; i < Totals::kNumbers; ++i) totals.numbers[i * kConvThreads] = 0;
  }
  a.math.prepare(p, shared.steps);

  WarpTile tile;
  tile.first_output = first + warp % columns * kWarpChannels;
  tile.outputs = min(p.block, p.out_channels - first) - warp % columns * kWarpChannels;
  tile.first_input = first_input;
  EpilogueTile<T> results;
  results.stage[0] = reinterpret_cast<T*>(shared.stage);
  results.stage[1] = reinterpret_cast<T*>(shared.stage + (Epilogue::kStaged - 1) * kStage);
  results.first_output = tile.first_output;
  results.outputs = tile.outputs;
  results.out_channels = p.out_channels;
  for (int64_t t = blockIdx.y; t < p.all_tiles; t += gridDim.y) {
    const TilePlace place = TilePlace::of(p, t);
    const Region region = place.patch(p);
    start_fill<T>(a.source.first(), a.source.channels, region, first_input, p.span, shared.patch, p.pitch);
    if (side != nullptr)
      start_fill<T>(a.source.second(), a.source.channels, region, first_input, p.span, side, p.pitch);
    const bool watch = a.math.turns(true) > 1;
    const bool saw = finish_fill<T>(a.source, region, first_input, p.span, shared.patch, side, p.pitch, watch);
    const int turns = a.math.turns(__syncthreads_or(saw) != 0);
    for (int item = warp / columns; item < items * p.classes() && tile.outputs > 0; item += kConvWarps / columns) {
      tile.c = item / items;
      const int own = item % items * kWarpPixels + lane;
      const int row = own / p.tile.w, image = row / p.tile.h, v = own % p.tile.w, u = row % p.tile.h;
      const int y = (place.top + u) * p.out_step.h + tile.c / p.out_step.w;
      const int x = (place.left + v) * p.out_step.w + tile.c % p.out_step.w;
      const bool exists = own < p.tile_pixels() && place.image + image < p.images && y < p.out.h && x < p.out.w;
      const int64_t pixel = exists ? (int64_t{place.image + image} * p.out.h + y) * p.out.w + x : -1;
      const int in_patch = (image * p.patch.h + u * p.in_step.h) * p.patch.w + v * p.in_step.w;
      tile.patch_offset = exists ? in_patch * p.pitch : 0;
      a.epilogue.template stage_operands<T>(results, lane, pixel);
      const unsigned rows = __ballot_sync(kFullMask, exists);
#pragma unroll
      for (int i = 0; i < kRows; ++i) results.valid_row[i] = rows >> Math::row(lane, i) & 1;
      for (int turn = 0; turn < turns; ++turn) {
        Sums sums;
        const bool mine = Math::mine(turns, turn, lane);
        a.math.accumulate(p, shared, tile, lane, mine, sums);
        wait_for_copies();
        __syncwarp();
        if (mine) a.epilogue.template finish<Math>(results, lane, sums, totals);
      }
      __syncwarp();
      stage_out(a.out, results.stage[0], lane, pixel, tile.first_output, tile.outputs);
      __syncwarp();  // the stage is written again
    }
    __syncthreads();  // so is the patch
  }
  if (a.partials.numbers != nullptr)
    write_partials<Math, Epilogue>(p, a.partials, reinterpret_cast<double*>(memory), first, totals);
}

// Merges the blocks' partials in double, each slice of threads its own in order, then the slices.
template <class Merge>
__global__ void __launch_bounds__(kWarpSize* kMergeSlices, 1)
    conv_merge_kernel(const Partials partials, int parts, int channels, float* out) {
  __shared__ double shared[3][kMergeSlices][kWarpSize + 1];
  const int c = static_cast<int>(blockIdx.x * kWarpSize + threadIdx.x);
  double n = 0, a = 0, b = 0;
  const auto merge = [&](double m, double other_a, double other_b) {
    Merge::merge(a, b, n, other_a, other_b, m);
    n += m;
  };
  for (int part = static_cast<int>(threadIdx.y); part < parts && c < channels; part += static_cast<int>(blockDim.y)) {
    const int64_t at = 2 * int64_t{part} * channels + c;
    merge(partials.counts[part], partials.numbers[at], partials.numbers[at + channels]);
  }
  shared[0][threadIdx.y][threadIdx.x] = n;
  shared[1][threadIdx.y][threadIdx.x] = a;
  shared[2][threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int slice = 1; slice < static_cast<int>(blockDim.y); ++slice)
    merge(shared[0][slice][threadIdx.x], shared[1][slice][threadIdx.x], shared[2][slice][threadIdx.x]);
  out[c] = static_cast<float>(a);
  out[channels + c] = static_cast<float>(b);
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's side
// ---------------------------------------------------------------------------------------------------------------------

// How the sums of a convolution with these groups come about; the same question for every pass.
enum class Grouping { kDepthwise, kMatrix };

inline Grouping grouping_of(const char* op, const ConvShape& s) {
  const int in = s.channels / s.groups, out = s.filters / s.groups;
  STD_TORCH_CHECK(s.channels % 8 == 0 && s.filters % 8 == 0, op, ": ", s.channels, " and ", s.filters,
                  " channels must be multiples of 8");
  if (in == 1 && out == 1) return Grouping::kDepthwise;
  STD_TORCH_CHECK((in % 8 == 0 && out % 8 == 0) || (in == 4 && out == 4), op, ": groups of ", in, " to ", out,
                  " channels are neither depthwise, nor 4 to 4, nor multiples of 8");
  return Grouping::kMatrix;
}

inline ConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, op, ": x and weight must have 4 dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation must be pairs");
  const auto extent = [](const std::vector<int64_t>& v) {
    return Extent{static_cast<int>(v[0]), static_cast<int>(v[1])};
  };
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(x.size(d) < (int64_t{1} << 31), op, ": dimension ", d, " of x is too large");
  ConvShape s{};
  s.images = static_cast<int>(x.size(0));
  s.channels = static_cast<int>(x.size(1));
  s.filters = static_cast<int>(weight.size(0));
  const int64_t per_group = weight.size(1);
  STD_TORCH_CHECK(per_group > 0 && x.size(1) % per_group == 0, op, ": weight with ", per_group,
                  " channels per group does not fit x with ", x.size(1));
  s.groups = static_cast<int>(x.size(1) / per_group);
  STD_TORCH_CHECK(s.filters % s.groups == 0, op, ": ", s.groups, " groups do not divide ", s.filters, " filters");
  s.in = {static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
  s.kernel = {static_cast<int>(weight.size(2)), static_cast<int>(weight.size(3))};
  s.stride = extent(stride);
  s.padding = extent(padding);
  s.dilation = extent(dilation);
  STD_TORCH_CHECK(std::min({s.stride.h, s.stride.w, s.dilation.h, s.dilation.w, s.kernel.h, s.kernel.w}) > 0 &&
                      std::min(s.padding.h, s.padding.w) >= 0,
                  op, ": stride, dilation and kernel must be positive, padding not negative");
  STD_TORCH_CHECK(s.kernel.h * s.kernel.w <= kMostTaps, op, ": a kernel has at most ", kMostTaps, " taps");
  STD_TORCH_CHECK(s.stride.h * s.stride.w <= kMostClasses, op, ": the stride is too large");
  const auto out = [](int in, int kernel, int stride, int padding, int dilation) {
    return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  s.out = {out(s.in.h, s.kernel.h, s.stride.h, s.padding.h, s.dilation.h),
           out(s.in.w, s.kernel.w, s.stride.w, s.padding.w, s.dilation.w)};
  STD_TORCH_CHECK(s.out.h > 0 && s.out.w > 0, op, ": the result would be empty");
  return s;
}

// A channels_last tensor, or a channel slice of one, that can be read and written 16 bytes at a time.
inline int64_t vector_pitch(const char* op, const char* name, const Tensor& t) {
  const int64_t pitch = pixel_pitch(t);
  STD_TORCH_CHECK(pitch > 0, op, ": ", name, " must be channels_last, or a slice of the channels of such a tensor");
  const int64_t bytes = t.element_size();
  STD_TORCH_CHECK(
      pitch * bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVectorBytes == 0, op,
      ": ", name, " must begin at, and its pixels lie apart, multiples of 16 bytes");
  return pitch;
}

inline Input vector_input(const char* op, const char* name, const Device& device, const Tensor& t) {
  return {device.in(t), vector_pitch(op, name, t)};
}
inline Input vector_input(const char* op, const char* name, const Device& device, const std::optional<Tensor>& t) {
  return t ? vector_input(op, name, device, *t) : Input{nullptr, 0};
}

// An uninitialised channels_last tensor.
inline Tensor channels_last_tensor(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  Tensor rows = torch::stable::new_empty(like, {n, h, w, c});
  rows = torch::stable::transpose(rows, 1, 3);
  return torch::stable::transpose(rows, 2, 3);
}

inline void check_pixels(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t n, int64_t c,
                         Extent e) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.get_device_index() == like.get_device_index(), op, ": ",
                  name, " must have the dtype and device of x");
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == n && t.size(1) == c && t.size(2) == e.h && t.size(3) == e.w, op, ": ",
                  name, " must have shape [", n, ", ", c, ", ", e.h, ", ", e.w, "]");
}

inline void check_rows(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == 4 && t->size(1) == channels && t->is_contiguous() &&
                      t->scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": ", name, " must be a contiguous float32 tensor of shape [4, ", channels, "]");
}

inline Weights weights_of(const Device& device, const Tensor& weight, bool transposed) {
  return {device.in(weight),
          weight.stride(transposed ? 1 : 0),
          weight.stride(transposed ? 0 : 1),
          weight.stride(2),
          weight.stride(3),
          static_cast<int>(weight.size(3)),
          transposed};
}

inline int64_t most_shared() {
  int device = 0, bytes = 0;
  FR_CUDA_CHECK(cudaGetDevice(&device));
  FR_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Blocks of a kernel that run at once, per processor.
template <class... P>
int64_t resident_blocks(void (*kernel)(P...), int64_t shared) {
  FR_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared())));
  int count = 0;
  FR_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kConvThreads, shared));
  return std::max(count, 1);
}

// Everything but how the sums come about.
template <class Source, class Epilogue>
struct ConvCall {
  const char* op;
  const Device& device;
  const Tensor& like;  // where results and scratch memory go
  const Tensor& weight;
  ConvPlan plan;  // not tiled yet
  bool transposed;
  int sources;
  Source source;
  Epilogue epilogue;
  Output out;
  Tensor* totals;  // [2, channels] of what the epilogue takes, or null
};

template <class Math, class Source, class Epilogue>
void launch_conv(const ConvCall<Source, Epilogue>& call, const ConvPlan& plan, const Math& math, int64_t shared) {
  const auto kernel = conv_grouped_kernel<Math, Source, Epilogue>;
  const int64_t wanted = ceil_div(processors() * resident_blocks(kernel, shared), plan.blocks);
  const int64_t parts = std::min<int64_t>({plan.all_tiles, wanted, 65535});
  ConvArgs<Math, Source, Epilogue> args{plan, math, call.source, call.epilogue, call.out, {nullptr, nullptr}};
  constexpr auto kDouble = torch::headeronly::ScalarType::Double;
  const int64_t kept = call.totals == nullptr ? 0 : parts;
  Tensor numbers = torch::stable::new_empty(call.like, {2 * kept, plan.out_channels}, kDouble);
  Tensor counts = torch::stable::new_empty(call.like, {kept}, kDouble);
  if (kept > 0) args.partials = {call.device.template out<double>(numbers), call.device.template out<double>(counts)};
  const dim3 grid(as_dim(plan.blocks), as_dim(parts));
  conv_grouped_kernel<Math, Source, Epilogue>
      <<<grid, dim3(kConvThreads), static_cast<size_t>(shared), call.device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  if (kept == 0) return;
  float* out = call.device.template out<float>(*call.totals);
  const dim3 slices(kWarpSize, as_dim(std::min<int64_t>(parts, kMergeSlices)));
  conv_merge_kernel<typename Epilogue::Merge>
      <<<dim3(as_dim(ceil_div(plan.out_channels, kWarpSize))), slices, 0, call.device.stream()>>>(
          args.partials, static_cast<int>(parts), plan.out_channels, out);
  FR_CUDA_CHECK(cudaGetLastError());
}

inline dim3 pack_grid(int64_t elements) {
  return dim3(as_dim(std::max<int64_t>(1, std::min<int64_t>(ceil_div(elements, kConvThreads), 1024))));
}

template <class T, class Source, class Epilogue>
void run_conv(const ConvCall<Source, Epilogue>& call, Grouping grouping) {
  constexpr bool kWide = sizeof(T) == sizeof(float);
  const bool matrix = grouping == Grouping::kMatrix && !kWide;
  const MatrixSteps steps = MatrixSteps::of(call.plan);
  const int64_t stage = int64_t{kConvWarps} * Epilogue::kStaged * kWarpPixels * kStagePitch * sizeof(T);
  const int64_t table = matrix ? 2 * int64_t{steps.first[call.plan.classes()]} * sizeof(int) : 0;
  const int64_t kept = call.totals == nullptr ? 0 : int64_t{Totals::kNumbers} * kConvThreads * sizeof(float);
  const Tiling tiling{sizeof(T), call.sources, 0, kChunkBytes + stage + kept + table, 512, most_shared()};
  const ConvPlan plan = tiled(call.op, call.plan, tiling);
  // A block's totals meet where its patch was.
  const int64_t totals = int64_t{kConvWarps} * kTotalsStride * sizeof(double);
  const int64_t shared = std::max(shared_bytes(plan, tiling), totals);
  const Weights weights = weights_of(call.device, call.weight, call.transposed);
  if (!matrix) {
    constexpr auto kFloat = torch::headeronly::ScalarType::Float;
    const int64_t size = int64_t{plan.all_taps()} * plan.out_channels * plan.group_in;
    Tensor packed = torch::stable::new_empty(call.like, {size}, kFloat);
    float* rows = call.device.template out<float>(packed);
    conv_pack_rows_kernel<T><<<pack_grid(size), dim3(kConvThreads), 0, call.device.stream()>>>(plan, weights, rows);
    FR_CUDA_CHECK(cudaGetLastError());
    if (grouping == Grouping::kDepthwise) return launch_conv(call, plan, DepthMath<T>{rows}, shared);
    if constexpr (kWide) launch_conv(call, plan, ScalarMath{rows}, shared);
  } else if constexpr (!kWide) {
    const int64_t size = int64_t{steps.first[plan.classes()]} * plan.out_channels / 8 * 32;
    Tensor packed = torch::stable::new_empty(call.like, {size * 4});
    T* fragments = call.device.template out<T>(packed);
    conv_pack_fragments_kernel<T>
        <<<pack_grid(size), dim3(kConvThreads), 0, call.device.stream()>>>(plan, steps, weights, fragments);
    FR_CUDA_CHECK(cudaGetLastError());
    const bool halves = plan.group_in < 8;
    if (plan.group_out % 32 == 0 && plan.block % 32 == 0)
      launch_conv(call, plan, MatrixMath<T, 4>{steps, fragments, halves}, shared);
    else if (plan.group_out % 16 == 0 && plan.block % 16 == 0)
      launch_conv(call, plan, MatrixMath<T, 2>{steps, fragments, halves}, shared);
    else
      launch_conv(call, plan, MatrixMath<T, 1>{steps, fragments, halves}, shared);
  }
}

template <class Source, class Epilogue>
void dispatch_conv(const ConvCall<Source, Epilogue>& call, Grouping grouping) {
  using torch::headeronly::ScalarType;
  switch (call.like.scalar_type()) {
    case ScalarType::Float:
      return run_conv<float>(call, grouping);
    case ScalarType::Half:
      return run_conv<__half>(call, grouping);
    case ScalarType::BFloat16:
      return run_conv<__nv_bfloat16>(call, grouping);
    default:
      STD_TORCH_CHECK(false, call.op, ": the dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace fusedres
