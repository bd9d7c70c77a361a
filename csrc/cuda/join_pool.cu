// Max pooling of a normalised and activated tensor on CUDA, and its gradient; see fusedres/ops/join_pool.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "common/pool.h"
#include "cuda/join.h"

namespace fusedres {
namespace {

constexpr auto kByte = torch::headeronly::ScalarType::Byte;
constexpr int kForwardBlocks = 3, kBackwardBlocks = 4;  // of a processor
constexpr int kPositionsAtOnce = 3;                     // of a row of a window, whose loads a thread has in flight
constexpr int kWindowsAtOnce = 2;                       // that cover a pixel, likewise
constexpr int kPoolNumbers = kShift + 1;

// ---------------------------------------------------------------------------------------------------------------------
// Windows and pixels
// ---------------------------------------------------------------------------------------------------------------------

struct Range {
  int begin, end;
};

// Dimension 0 is the height, 1 the width.
struct Windows {
  int kernel[2], stride[2], padding[2];
  int image[2], pooled[2];

  // The part of the image that is in window `at`; never empty.
  __device__ __forceinline__ Range positions(int d, int at) const {
    const int begin = at * stride[d] - padding[d];
    return {max(begin, 0), min(begin + kernel[d], image[d])};
  }

  // The windows that position `at` of the image is in.
  __device__ __forceinline__ Range covering(int d, int at) const {
    const int padded = at + padding[d];
    return {padded < kernel[d] ? 0 : (padded - kernel[d]) / stride[d] + 1, min(padded / stride[d] + 1, pooled[d])};
  }

  // What a position is counted as in a window.
  __device__ __forceinline__ int number(int position_y, int position_x, int window_y, int window_x) const {
    return (position_y + padding[0] - window_y * stride[0]) * kernel[1] + position_x + padding[1] -
           window_x * stride[1];
  }
};

// A unit is what is pooled apart from all else: a sample in channels_last, a plane in the contiguous layout.
struct Pixel {
  int64_t unit;
  int y, x;

  static __device__ __forceinline__ Pixel of(const Walk& walk, const int (&image)[2], int64_t row, int64_t column) {
    const uint32_t plane = static_cast<uint32_t>(image[0]) * image[1], width = image[1];
    const uint32_t at = walk.contiguous ? static_cast<uint32_t>(column) : static_cast<uint32_t>(row) % plane;
    return {walk.contiguous ? row : static_cast<uint32_t>(row) / plane, static_cast<int>(at / width),
            static_cast<int>(at % width)};
  }
};

// A pack as it was loaded, in whole words. Shorter lanes the compiler would take apart at once, and so wait for each
// load before it starts the next.
template <class T, int kWidth>
struct Loaded {
  using Lanes = Pack<T, kWidth>;
  using Word = std::conditional_t<sizeof(Lanes) % sizeof(uint32_t) == 0, uint32_t, T>;
  using Words = Pack<Word, static_cast<int>(sizeof(Lanes) / sizeof(Word))>;
  Words words;

  static __device__ __forceinline__ Loaded of(const Input& input, int64_t row, int64_t column) {
    const T* p = static_cast<const T*>(input.data) + row * input.pitch + column;
    return {Words::load(reinterpret_cast<const Word*>(p))};
  }
  __device__ __forceinline__ Lanes lanes() const { return reinterpret_cast<const Lanes&>(words); }
};

// use(i, load(i)) for every i of the range, in order, with kAtOnce loads in flight.
template <int kAtOnce, class Load, class Use>
__device__ __forceinline__ void for_each(Range range, const Load& load, const Use& use) {
  for (int first = range.begin; first < range.end; first += kAtOnce) {
    decltype(load(first)) loaded[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k >= range.end) break;
      loaded[k] = load(first + k);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k >= range.end) break;
      use(first + k, loaded[k]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// Rows of y are its pixels in either layout; `walk` is the result's.
struct JoinPoolArgs {
  Walk walk;
  Windows windows;
  Input y;
  Norm norm;
  int64_t act;
  float act_param;
  Output out, taken;  // the latter's data may be null
};

// Of each lane, the value that the window gives so far, and its number; four numbers to a word, to save registers.
template <class T, int kWidth>
struct Best {
  static constexpr int kWords = kWidth < 4 ? 1 : kWidth / 4;
  Pack<T, kWidth> value;
  uint32_t taken[kWords];

  // Nothing is less than -infinity: where a window holds nothing else, its first position was taken.
  __device__ __forceinline__ explicit Best(int first) {
#pragma unroll
    for (T& lane : value.lane) lane = from_float<T>(-INFINITY);
#pragma unroll
    for (uint32_t& word : taken) word = first * 0x01010101u;
  }

  __device__ __forceinline__ void meet(const Pack<T, kWidth>& next, int number) {
    const uint32_t numbers = number * 0x01010101u;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float v = to_float(next.lane[i]);
      const uint32_t mask = 0xffu << i % 4 * 8;
      if (!(v > to_float(value.lane[i]) || isnan(v))) continue;
      value.lane[i] = next.lane[i];
      taken[i / 4] = (taken[i / 4] & ~mask) | (numbers & mask);
    }
  }

  __device__ __forceinline__ void store(const JoinPoolArgs& a, int64_t row, int64_t column) const {
    a.out.store(row, column, value);
    if (a.taken.data == nullptr) return;
    Pack<uint8_t, kWidth> numbers;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) numbers.lane[i] = static_cast<uint8_t>(taken[i / 4] >> i % 4 * 8);
    a.taken.store(row, column, numbers);
  }
};

template <class T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> joined(const JoinPoolArgs& a, const Numbers<kWidth, kPoolNumbers>& numbers,
                                                  const Pack<T, kWidth>& y) {
  float scale[kWidth], shift[kWidth];
  numbers.get(kScale, scale);
  numbers.get(kShift, shift);
  Pack<T, kWidth> out;
  // Inside the kernel, as in the join.
  dispatch_activation(a.act, [&](auto act) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      out.lane[i] = from_float<T>(decltype(act)::forward(fmaf(scale[i], to_float(y.lane[i]), shift[i]), a.act_param));
  });
  return out;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) join_pool_fwd_kernel(const JoinPoolArgs a) {
  __shared__ typename Numbers<kWidth, kPoolNumbers>::Storage storage;
  Numbers<kWidth, kPoolNumbers> numbers(storage, a.walk);
  const auto compute = [&](int64_t c, int64_t, float* out) {
    out[kScale] = a.norm.scale(a.walk.channels, c);
    out[kShift] = a.norm.shift(a.walk.channels, c);
  };
  numbers.load_group(a.walk, 0, compute);
  const Windows& w = a.windows;
  const Place place = Place::mine<kWidth>();
  if (place.column >= a.walk.row_length) return;
  const int64_t channel = a.walk.contiguous ? 0 : place.column;
  for (int64_t row = place.row; row < a.walk.rows; row += place.step) {
    numbers.load_row(a.walk, row, compute);
    const Pixel window = Pixel::of(a.walk, w.pooled, row, place.column);
    const Range ys = w.positions(0, window.y), xs = w.positions(1, window.x);
    const int origin = w.number(0, 0, window.y, window.x);  // what the first pixel of the image would be
    const int64_t image = window.unit * w.image[0] * w.image[1];
    Best<T, kWidth> best(origin + ys.begin * w.kernel[1] + xs.begin);
    for (int y = ys.begin; y < ys.end; ++y) {
      const int64_t before = image + int64_t{y} * w.image[1];
      for_each<kPositionsAtOnce>(
          xs, [&](int x) { return Loaded<T, kWidth>::of(a.y, before + x, channel); },
          [&](int x, const Loaded<T, kWidth>& loaded) {
            best.meet(joined(a, numbers, loaded.lanes()), origin + y * w.kernel[1] + x);
          });
    }
    best.store(a, row, place.column);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// Rows of grad and taken are their pixels in either layout; `walk` is the image's.
struct JoinPoolBackwardArgs {
  Walk walk;
  Windows windows;
  Input grad, taken;
  Output out;
};

template <class T, int kWidth>
struct Given {
  Loaded<T, kWidth> grad;
  Loaded<uint8_t, kWidth> taken;
};

// Each value looks for the windows that took it: no two threads write to one place, and sums have one order.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) join_pool_bwd_kernel(const JoinPoolBackwardArgs a) {
  const Windows& w = a.windows;
  const Place place = Place::mine<kWidth>();
  if (place.column >= a.walk.row_length) return;
  const int64_t channel = a.walk.contiguous ? 0 : place.column;
  for (int64_t row = place.row; row < a.walk.rows; row += place.step) {
    const Pixel pixel = Pixel::of(a.walk, w.image, row, place.column);
    const Range ys = w.covering(0, pixel.y), xs = w.covering(1, pixel.x);
    float sum[kWidth] = {};
    for (int y = ys.begin; y < ys.end; ++y) {
      const int64_t before = (pixel.unit * w.pooled[0] + y) * w.pooled[1];
      const auto load = [&](int x) -> Given<T, kWidth> {
        return {Loaded<T, kWidth>::of(a.grad, before + x, channel),
                Loaded<uint8_t, kWidth>::of(a.taken, before + x, channel)};
      };
      for_each<kWindowsAtOnce>(xs, load, [&](int x, const Given<T, kWidth>& given) {
        const int number = w.number(pixel.y, pixel.x, y, x);
        const Pack<T, kWidth> grad = given.grad.lanes();
        const Pack<uint8_t, kWidth> taken = given.taken.lanes();
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += taken.lane[i] == number ? to_float(grad.lane[i]) : 0.f;
      });
    }
    Pack<T, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out.lane[i] = from_float<T>(sum[i]);
    a.out.store(row, place.column, out);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's side
// ---------------------------------------------------------------------------------------------------------------------

// The window's numbers as the kernels take them: coordinates and numbers of pixels in 32 bits.
Windows windows_of(const char* op, const PoolWindow& window, const Tensor& image, const Tensor& pooled) {
  Windows w{};
  for (int d = 0; d < 2; ++d) {
    w.kernel[d] = static_cast<int>(window.kernel[d]);
    w.stride[d] = static_cast<int>(window.stride[d]);
    w.padding[d] = static_cast<int>(window.padding[d]);
    w.image[d] = static_cast<int>(image.size(2 + d));
    w.pooled[d] = static_cast<int>(pooled.size(2 + d));
  }
  for (const Tensor* t : {&image, &pooled}) {
    const int64_t plane = t->size(2) * t->size(3);
    STD_TORCH_CHECK(plane < int64_t{1} << 30 && t->size(0) * plane < int64_t{1} << 32, op, ": too many pixels in ",
                    shape_of_tensor(*t));
  }
  return w;
}

// A tensor whose rows are pixels.
Input pixels_of(const Device& device, Layout layout, const Tensor& t) {
  return {device.in(t), layout == Layout::kContiguous ? 1 : pixel_pitch(t)};
}

// By the tensor that is read, whose pixels may lie further apart than the result's, which are dense.
template <class F>
void dispatch_pixels(const char* op, const Tensor& read, Layout layout, std::initializer_list<Input> tensors,
                     const F& f) {
  Walk walk = walk_of(Spans::of(read, layout), false);
  if (walk.contiguous) walk.row_length = 1;  // what lies beside an element is in other windows
  dispatch_vector(op, read, walk, tensors, f);
}

std::tuple<Tensor, Tensor> join_pool_cuda(const Tensor& y, std::optional<Tensor> norm, int64_t act, double act_param,
                                          std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                          std::vector<int64_t> padding, bool ceil, bool record) {
  constexpr const char* kOp = "join_pool_cuda";
  const PoolWindow window = PoolWindow::of(kOp, kernel, stride, padding, ceil);
  const auto [height, width] = pooled_image(kOp, y, window);
  if (norm) check_norm(kOp, "norm", *norm, y);
  check_activation(kOp, act);
  const Device device(y);
  const Layout layout = pooled_layout(kOp, y);
  Tensor out = empty_image(y, layout, height, width);
  Tensor taken = record ? empty_image(y, layout, height, width, kByte) : torch::stable::new_empty(y, {0}, kByte);
  if (y.numel() == 0) return {out, taken};
  const Spans spans = Spans::of(out, layout);
  JoinPoolArgs args{};
  args.walk = walk_of(spans, false);
  args.windows = windows_of(kOp, window, y, out);
  args.y = pixels_of(device, layout, y);
  args.norm = {device.in<float>(norm)};
  args.act = act;
  args.act_param = static_cast<float>(act_param);
  args.out = output_of(device, spans, out);
  if (record) args.taken = output_of(device, spans, taken);
  dispatch_pixels(kOp, y, layout, {args.y}, [&](auto vector) {
    using V = decltype(vector);
    const Shape shape = shape_of(args.walk, V::width, 1, kForwardBlocks, kMostColumns);
    join_pool_fwd_kernel<typename V::Element, V::width><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return {out, taken};
}

Tensor join_pool_backward_cuda(const Tensor& grad, const Tensor& taken, const Tensor& y, std::vector<int64_t> kernel,
                               std::vector<int64_t> stride, std::vector<int64_t> padding) {
  constexpr const char* kOp = "join_pool_backward_cuda";
  const PoolWindow window = PoolWindow::of(kOp, kernel, stride, padding, false);
  check_pool_gradient(kOp, grad, taken, y, window);
  const Device device(y);
  Tensor out = empty_image(y, pooled_layout(kOp, y), y.size(2), y.size(3));
  if (y.numel() == 0) return out;
  const Layout layout = shared_layout(kOp, {{"y", &y}, {"grad", &grad}, {"taken", &taken}});
  const Spans spans = Spans::of(out, layout);
  JoinPoolBackwardArgs args{};
  args.walk = walk_of(spans, false);
  args.windows = windows_of(kOp, window, y, grad);
  args.grad = pixels_of(device, layout, grad);
  args.taken = pixels_of(device, layout, taken);
  args.out = output_of(device, spans, out);
  dispatch_pixels(kOp, grad, layout, {args.grad, args.taken}, [&](auto vector) {
    using V = decltype(vector);
    const Shape shape = shape_of(args.walk, V::width, 1, kBackwardBlocks, kMostColumns);
    join_pool_bwd_kernel<typename V::Element, V::width><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("join_pool_cuda", TORCH_BOX(&fusedres::join_pool_cuda));
  m.impl("join_pool_backward_cuda", TORCH_BOX(&fusedres::join_pool_backward_cuda));
}
