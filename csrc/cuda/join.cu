// The join on CUDA: affine, gain, residual, activation and dropout in one pass; see fusedres/ops/join.py for the
// formula.
#include <torch/csrc/stable/library.h>

#include "cuda/join.h"

namespace fusedres {
namespace {

constexpr int kUnroll = 2;  // rows whose loads a thread has in flight
constexpr int kBlocksPerProcessor = 3;

struct JoinArgs : JoinOperands {
  Output out;
};

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) join_fwd_kernel(const JoinArgs a) {
  using Elements = Pack<T, kWidth>;
  __shared__ typename Numbers<kWidth, kForwardNumbers>::Storage storage;
  Numbers<kWidth, kForwardNumbers> numbers(storage, a.walk);
  const auto compute = [&](int64_t c, int64_t sample_channel, float* out) {
    affine_numbers(a, c, sample_channel, out);
  };
  const Place place = Place::mine<kWidth>();
  const bool inside = place.column < a.walk.row_length;
  for (int64_t group = blockIdx.z; group < a.walk.groups; group += gridDim.z) {
    const int64_t before = group * a.walk.rows;
    numbers.load_group(a.walk, group, compute);
    for (int64_t first = place.row; inside && first < a.walk.rows; first += place.step * kUnroll) {
      Elements y[kUnroll], residual[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) break;
        y[k] = a.y.load<T, kWidth>(before + row, place.column);
        residual[k] = a.residual.data == nullptr ? y[k] : a.residual.load<T, kWidth>(before + row, place.column);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t row = first + k * place.step;
        if (row >= a.walk.rows) break;
        numbers.load_row(a.walk, row, compute);
        float z[kWidth], scales[kWidth];
        argument(a, numbers, y[k], residual[k], z);
        scales_of<kDropout>(a, group, row, place.column, scales);
        a.out.store(before + row, place.column, activated<T, kDropout>(a, z, scales));
      }
    }
  }
}

Tensor join_cuda(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                 std::optional<Tensor> res_norm, int64_t act, double act_param, std::optional<Tensor> gain,
                 double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_cuda";
  const JoinGiven given{y, norm, residual, res_norm, act, act_param, gain, dropout, seed};
  given.check(kOp);
  const Device device(y);
  Tensor out = torch::stable::empty_like(y);
  if (y.numel() == 0) return out;
  const Layout layout = shared_layout(kOp, {{"y", &y}, {"residual", pointer_to(residual)}, {"y", &out}});
  const Spans spans = Spans::of(y, layout);
  JoinArgs args{};
  static_cast<JoinOperands&>(args) = given.operands(kOp, device, spans, gain.has_value());
  args.out = output_of(device, spans, out);
  dispatch_vector(kOp, y, args.walk, {args.y, args.residual, as_input(args.out)}, [&](auto vector) {
    using V = decltype(vector);
    const Shape shape = shape_of(args.walk, V::width, kUnroll, kBlocksPerProcessor, kMostColumns);
    if (args.dropout.active)
      join_fwd_kernel<typename V::Element, V::width, true><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    else
      join_fwd_kernel<typename V::Element, V::width, false><<<shape.grid, shape.block, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("join_cuda", TORCH_BOX(&fusedres::join_cuda)); }
