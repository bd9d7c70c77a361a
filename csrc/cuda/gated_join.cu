// The gated join and its backward on CUDA; see fusedres/ops/gated_join.py for the formulas.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "common/activations.h"
#include "common/checks.h"
#include "cuda/flat.h"

namespace fusedres {
namespace {

struct GatedJoinArgs {
  int64_t count;
  float threshold;
  const void *f, *logits, *x;
  void* out;
};

// A gradient whose pointer is null is not wanted; f and x are read for that of the logits alone.
struct GatedJoinBackwardArgs {
  int64_t count;
  float threshold;
  const void *grad, *logits, *f, *x;
  void *grad_f, *grad_logits, *grad_x;
};

// What multiplies the branch.
template <bool kSparse>
__device__ __forceinline__ float gate(float s, float threshold) {
  if constexpr (kSparse) return s > threshold ? 1.f : 0.f;
  return s;
}

template <class T, int kWidth, bool kSparse>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocksPerProcessor) gated_join_fwd_kernel(const GatedJoinArgs a) {
  for_each_pack<kWidth>(a.count, [&](int64_t at, int n) {
    const auto logits = load_pack<T, kWidth>(a.logits, at, n);
    const auto f = load_pack<T, kWidth>(a.f, at, n), x = load_pack<T, kWidth>(a.x, at, n);
    float out[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float m = gate<kSparse>(sigmoid(to_float(logits.lane[i])), a.threshold);
      out[i] = fmaf(m, to_float(f.lane[i]), (1.f - m) * to_float(x.lane[i]));
    }
    store_pack<T>(a.out, at, n, out);
  });
}

template <class T, int kWidth, bool kSparse>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocksPerProcessor)
    gated_join_bwd_kernel(const GatedJoinBackwardArgs a) {
  for_each_pack<kWidth>(a.count, [&](int64_t at, int n) {
    const auto grad = load_pack<T, kWidth>(a.grad, at, n), logits = load_pack<T, kWidth>(a.logits, at, n);
    Pack<T, kWidth> f = {}, x = {};
    if (a.grad_logits != nullptr) {
      f = load_pack<T, kWidth>(a.f, at, n);
      x = load_pack<T, kWidth>(a.x, at, n);
    }
    float grad_f[kWidth], grad_logits[kWidth], grad_x[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float g = to_float(grad.lane[i]), s = sigmoid(to_float(logits.lane[i]));
      const float m = gate<kSparse>(s, a.threshold);
      grad_f[i] = m * g;
      grad_x[i] = (1.f - m) * g;
      grad_logits[i] = g * (to_float(f.lane[i]) - to_float(x.lane[i])) * (s * (1.f - s));
    }
    if (a.grad_f != nullptr) store_pack<T>(a.grad_f, at, n, grad_f);
    if (a.grad_logits != nullptr) store_pack<T>(a.grad_logits, at, n, grad_logits);
    if (a.grad_x != nullptr) store_pack<T>(a.grad_x, at, n, grad_x);
  });
}

Tensor gated_join_cuda(const Tensor& f, const Tensor& logits, const Tensor& x, std::optional<double> threshold) {
  constexpr const char* kOp = "gated_join_cuda";
  check_matches(kOp, "logits", logits, f);
  check_matches(kOp, "x", x, f);
  const Device device(f);
  Tensor out = torch::stable::empty_like(f);
  if (f.numel() == 0) return out;
  check_flat(kOp, {&f, &logits, &x, &out});
  const GatedJoinArgs args{f.numel(),    static_cast<float>(threshold.value_or(0.0)),
                           device.in(f), device.in(logits),
                           device.in(x), device.out(out)};
  dispatch_flat(kOp, f, std::array{args.f, args.logits, args.x}, [&](auto vector) {
    using V = decltype(vector);
    const dim3 grid = flat_grid(args.count, V::width);
    if (threshold)
      gated_join_fwd_kernel<typename V::Element, V::width, true><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    else
      gated_join_fwd_kernel<typename V::Element, V::width, false><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_join_backward_cuda(const Tensor& grad, const Tensor& logits,
                                                            std::optional<Tensor> f, std::optional<Tensor> x,
                                                            std::optional<double> threshold, bool need_f, bool need_x) {
  constexpr const char* kOp = "gated_join_backward_cuda";
  check_matches(kOp, "logits", logits, grad);
  if (f) check_matches(kOp, "f", *f, grad);
  if (x) check_matches(kOp, "x", *x, grad);
  const bool need_logits = f.has_value() && x.has_value();
  const Device device(grad);
  const auto output = [&grad](bool needed) {
    return needed ? torch::stable::empty_like(grad) : torch::stable::new_empty(grad, {0});
  };
  Tensor grad_f = output(need_f), grad_logits = output(need_logits), grad_x = output(need_x);
  if (grad.numel() == 0 || !(need_f || need_logits || need_x)) return {grad_f, grad_logits, grad_x};
  check_flat(kOp, {&grad, &logits, pointer_to(f), pointer_to(x)});
  GatedJoinBackwardArgs args{};
  args.count = grad.numel();
  args.threshold = static_cast<float>(threshold.value_or(0.0));
  args.grad = device.in(grad);
  args.logits = device.in(logits);
  if (need_f) args.grad_f = device.out(grad_f);
  if (need_x) args.grad_x = device.out(grad_x);
  if (need_logits) {
    args.f = device.in(f);
    args.x = device.in(x);
    args.grad_logits = device.out(grad_logits);
  }
  dispatch_flat(kOp, grad, std::array{args.grad, args.logits, args.f, args.x}, [&](auto vector) {
    using V = decltype(vector);
    const dim3 grid = flat_grid(args.count, V::width);
    if (threshold)
      gated_join_bwd_kernel<typename V::Element, V::width, true><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    else
      gated_join_bwd_kernel<typename V::Element, V::width, false><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return {grad_f, grad_logits, grad_x};
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("gated_join_cuda", TORCH_BOX(&fusedres::gated_join_cuda));
  m.impl("gated_join_backward_cuda", TORCH_BOX(&fusedres::gated_join_backward_cuda));
}
