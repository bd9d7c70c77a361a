// The join on CUDA: affine, gain, residual, activation and dropout in one pass; see fusedres/ops/join.py for the
// formula.
#include <torch/csrc/stable/library.h>

#include "cuda/join.h"

namespace fusedres {
namespace {

constexpr int kUnroll = 2;  // rows whose loads a thread has in flight
constexpr int kBlocksPerProcessor = 3;

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) join_fwd_kernel(const JoinArgs a) {
  __shared__ typename Numbers<kWidth, kForwardNumbers>::Storage storage;
  join_rows<T, kWidth, kDropout, kUnroll>(a, storage);
}

}  // namespace

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

}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("join_cuda", TORCH_BOX(&fusedres::join_cuda)); }
