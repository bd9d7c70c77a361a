// The join on CUDA: out = act(scale[c] * y + shift[c] + r) in one pass; see fusedres/ops/join.py for the formula.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "common/activations.h"
#include "common/checks.h"
#include "common/layout.h"
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace fusedres {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // rows whose loads a thread has in flight

struct JoinArgs {
  const void* y;
  const void* residual;  // null: nothing is added
  void* out;
  const float* norm;      // [4, channels], null: the identity
  const float* res_norm;  // likewise
  int64_t channels;
  int64_t rows;        // channels_last: pixels; contiguous: planes
  int64_t row_length;  // elements
  int64_t act;
  float act_param;
};

// scale * x + shift for a pack of neighbouring channels, or for one channel that the whole pack shares.
template <int kCount>
struct Affine {
  float scale[kCount], shift[kCount];

  __device__ __forceinline__ Affine(const float* norm, int64_t channels, int64_t channel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scale[i] = norm == nullptr ? 1.f : norm[2 * channels + channel + i];
      shift[i] = norm == nullptr ? 0.f : norm[3 * channels + channel + i];
    }
  }
  __device__ __forceinline__ float operator()(float x, int lane) const {
    const int i = kCount == 1 ? 0 : lane;
    return fmaf(scale[i], x, shift[i]);
  }
};

template <class T, int kWidth, class Main, class Side>
__device__ __forceinline__ Pack<T, kWidth> join_pack(const JoinArgs& a, const Pack<T, kWidth>& y,
                                                     const Pack<T, kWidth>& residual, const Main& main,
                                                     const Side& side) {
  float z[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    z[i] = main(to_float(y.lane[i]), i);
    if (a.residual != nullptr) z[i] += side(to_float(residual.lane[i]), i);
  }
  Pack<T, kWidth> out;
  // Inside the kernel, since every thread takes the same branch: one kernel instead of one per activation.
  dispatch_activation(a.act, [&](auto act) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out.lane[i] = from_float<T>(decltype(act)::forward(z[i], a.act_param));
  });
  return out;
}

// A thread keeps its column and walks down the rows. In channels_last a column is a channel (kPerLane), so that the
// parameters stay in registers; in the contiguous layout they change with every row.
template <class T, int kWidth, bool kPerLane>
__global__ void __launch_bounds__(kThreads) join_fwd_kernel(const JoinArgs a) {
  using Elements = Pack<T, kWidth>;
  constexpr int kChannels = kPerLane ? kWidth : 1;
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (column >= a.row_length) return;
  const T* y = static_cast<const T*>(a.y) + column;
  const T* residual = static_cast<const T*>(a.residual == nullptr ? a.y : a.residual) + column;
  T* out = static_cast<T*>(a.out) + column;
  Affine<kChannels> main(kPerLane ? a.norm : nullptr, a.channels, column);
  Affine<kChannels> side(kPerLane ? a.res_norm : nullptr, a.channels, column);

  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; first < a.rows; first += step * kUnroll) {
    Elements y_in[kUnroll], r_in[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t row = first + k * step;
      if (row >= a.rows) break;
      y_in[k] = Elements::load(y + row * a.row_length);
      r_in[k] = a.residual == nullptr ? y_in[k] : Elements::load(residual + row * a.row_length);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t row = first + k * step;
      if (row >= a.rows) break;
      if constexpr (!kPerLane) {
        main = {a.norm, a.channels, row % a.channels};
        side = {a.res_norm, a.channels, row % a.channels};
      }
      join_pack<T, kWidth>(a, y_in[k], r_in[k], main, side).store(out + row * a.row_length);
    }
  }
}

template <class T, int kWidth>
void launch(const JoinArgs& a, Layout layout, cudaStream_t stream) {
  const int64_t columns = a.row_length / kWidth;
  const int64_t tiles = ceil_div(columns, kThreads);
  const int64_t tile = ceil_div(columns, tiles);
  const dim3 block(static_cast<unsigned>(tile), static_cast<unsigned>(kThreads / tile));
  const int64_t wanted = ceil_div(a.rows, int64_t{block.y} * kUnroll);
  const int64_t resident = std::max<int64_t>(1, resident_blocks(kThreads) / tiles);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(wanted, resident)));
  if (layout == Layout::kChannelsLast)
    join_fwd_kernel<T, kWidth, true><<<grid, block, 0, stream>>>(a);
  else
    join_fwd_kernel<T, kWidth, false><<<grid, block, 0, stream>>>(a);
  FR_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_widest(const JoinArgs& a, Layout layout, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  bool vectorised = a.row_length % kWidth == 0;
  for (const void* p : {a.y, a.residual, static_cast<const void*>(a.out)})
    vectorised = vectorised && is_aligned<kWidth>(p, sizeof(T));
  if (vectorised)
    launch<T, kWidth>(a, layout, stream);
  else
    launch<T, 1>(a, layout, stream);
}

Tensor join_cuda(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                 std::optional<Tensor> res_norm, int64_t act, double act_param, std::optional<Tensor> gain,
                 double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_cuda";
  STD_TORCH_CHECK(!gain.has_value() && !seed.has_value() && dropout == 0, kOp, ": gain and dropout have no kernel yet");
  check_activation(kOp, act);
  if (residual) check_matches(kOp, "residual", *residual, y);
  STD_TORCH_CHECK(y.dim() == 4, kOp, ": y must have 4 dimensions, got ", y.dim());
  if (norm) check_norm(kOp, "norm", *norm, y);
  if (res_norm) check_norm(kOp, "res_norm", *res_norm, y);
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor out = torch::stable::empty_like(y);
  if (y.numel() == 0) return out;

  const Layout layout = common_layout(kOp, {&y, pointer_to(residual), &out});
  const Spans spans = Spans::of(y, layout);
  JoinArgs args{};
  args.y = y.const_data_ptr();
  args.residual = residual ? residual->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.norm = norm ? norm->const_data_ptr<float>() : nullptr;
  args.res_norm = res_norm ? res_norm->const_data_ptr<float>() : nullptr;
  args.channels = spans.channels;
  args.rows = spans.outer;
  args.row_length = spans.inner;
  args.act = act;
  args.act_param = static_cast<float>(act_param);
  const cudaStream_t stream = current_stream(y);
  switch (y.scalar_type()) {
    case ScalarType::Float:
      launch_widest<float>(args, layout, stream);
      break;
    case ScalarType::Half:
      launch_widest<__half>(args, layout, stream);
      break;
    case ScalarType::BFloat16:
      launch_widest<__nv_bfloat16>(args, layout, stream);
      break;
    default:
      STD_TORCH_CHECK(false, kOp, ": the dtype must be float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m) { m.impl("join_cuda", TORCH_BOX(&fusedres::join_cuda)); }
