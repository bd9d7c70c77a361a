// How threads walk over 4-d tensors, in either layout, and the launch that goes with it.
//
// A tensor is rows of neighbouring elements: in channels_last a pixel's channels, in the contiguous layout a channel's
// plane. A thread keeps its column and walks down the rows; so in channels_last what belongs to its channels stays in
// registers, while in the contiguous layout a row is one channel, and its numbers come with the row. Rows belong to
// groups: the samples, where samples differ in something, or all rows to one.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>

#include "common/layout.h"
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace fusedres {
namespace {

constexpr int kThreads = 256;

struct Walk {
  bool contiguous;
  int64_t channels;
  int64_t plane;
  int64_t groups;
  int64_t rows;  // of a group
  int64_t row_length;

  // The contiguous layout's; its rows can be counted in 32 bits.
  __device__ __forceinline__ int64_t channel_of(int64_t row) const {
    return static_cast<uint32_t>(row) % static_cast<uint32_t>(channels);
  }
  __device__ __forceinline__ int64_t sample_of(int64_t row) const {
    return static_cast<uint32_t>(row) / static_cast<uint32_t>(channels);
  }
};

// One of a walk's tensors: row r begins at data + r * pitch.
template <class P>
struct Rows {
  P data;  // null: the tensor is absent
  int64_t pitch;

  template <class T, int kWidth>
  __device__ __forceinline__ Pack<T, kWidth> load(int64_t row, int64_t column) const {
    return Pack<T, kWidth>::load(static_cast<const T*>(data) + row * pitch + column);
  }
  template <class T, int kWidth>
  __device__ __forceinline__ void store(int64_t row, int64_t column, const Pack<T, kWidth>& pack) const {
    pack.store(static_cast<T*>(data) + row * pitch + column);
  }
};
using Input = Rows<const void*>;
using Output = Rows<void*>;

// `by_sample`: samples differ in something. In the contiguous layout a row belongs to a sample and a channel anyway.
inline Walk walk_of(const Spans& spans, bool by_sample) {
  const bool contiguous = spans.layout == Layout::kContiguous;
  STD_TORCH_CHECK(!contiguous || spans.outer < (int64_t{1} << 32), "fusedres: more than 2^32 planes");
  const int64_t groups = by_sample && !contiguous ? spans.samples() : 1;
  return {contiguous, spans.channels, spans.plane, groups, spans.outer / groups, spans.inner};
}

inline Input input_of(const Device& device, const Spans& spans, const Tensor& t) {
  return {device.in(t), spans.pitch_of(t)};
}
inline Input input_of(const Device& device, const Spans& spans, const std::optional<Tensor>& t) {
  return t ? input_of(device, spans, *t) : Input{nullptr, 0};
}
inline Output output_of(const Device& device, const Spans& spans, Tensor& t) {
  return {device.out(t), spans.pitch_of(t)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

// Where a thread starts, and how far it steps.
struct Place {
  int64_t column, row, step;

  template <int kWidth>
  static __device__ __forceinline__ Place mine() {
    return {(int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth, int64_t{blockIdx.y} * blockDim.y + threadIdx.y,
            int64_t{gridDim.y} * blockDim.y};
  }
};

struct Shape {
  dim3 grid, block;
};

// Threads along a row up to a block's worth, the rest of the block along the rows; as many blocks as run at once, so
// that each loads what belongs to its channels once. A thread gets `unroll` rows at a time.
inline Shape shape_of(const Walk& walk, int width, int unroll, int blocks_per_processor, int64_t most_columns) {
  const int64_t columns = walk.row_length / width;
  const int64_t tiles = ceil_div(columns, walk.contiguous ? kThreads : most_columns);
  const int64_t tile = ceil_div(columns, tiles);
  const int64_t height = std::min<int64_t>(kThreads / tile, walk.rows);
  const int64_t groups = std::min<int64_t>(walk.groups, 65535);
  const int64_t wanted = ceil_div(walk.rows, height * unroll);
  const int64_t resident = processors() * blocks_per_processor / (tiles * groups);
  const int64_t chunks = std::min<int64_t>({wanted, std::max<int64_t>(resident, 1), 65535});
  return {dim3(as_dim(tiles), as_dim(chunks), as_dim(groups)), dim3(as_dim(tile), as_dim(height))};
}

template <int kWidth>
bool fits_vectors(const Walk& walk, size_t element_size, const void* data, int64_t pitch) {
  return data == nullptr ||
         (is_aligned<kWidth>(data, element_size) && (pitch % kWidth == 0 || walk.groups * walk.rows == 1));
}

// Calls f(Vector<T, width>{}) with the widest access that rows, addresses and pitches allow: 16 bytes, or one element.
template <class T, class F>
void dispatch_width(const Walk& walk, std::initializer_list<Input> tensors, const F& f) {
  constexpr int kWidth = kVectorWidth<T>;
  bool vectors = walk.row_length % kWidth == 0;
  for (const Input& t : tensors) vectors = vectors && fits_vectors<kWidth>(walk, sizeof(T), t.data, t.pitch);
  vectors ? f(Vector<T, kWidth>{}) : f(Vector<T, 1>{});
}

template <class F>
void dispatch_vector(const char* op, const Tensor& like, const Walk& walk, std::initializer_list<Input> tensors,
                     const F& f) {
  using torch::headeronly::ScalarType;
  switch (like.scalar_type()) {
    case ScalarType::Float:
      return dispatch_width<float>(walk, tensors, f);
    case ScalarType::Half:
      return dispatch_width<__half>(walk, tensors, f);
    case ScalarType::BFloat16:
      return dispatch_width<__nv_bfloat16>(walk, tensors, f);
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, bfloat16 or float16");
  }
}

inline Input as_input(const Output& out) { return {out.data, out.pitch}; }

}  // namespace
}  // namespace fusedres
