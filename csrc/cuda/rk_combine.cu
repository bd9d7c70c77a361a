// The Runge-Kutta updates and the norm of their error on CUDA; see fusedres/ops/rk_combine.py for the formulas.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/tolerance.h"
#include "cuda/flat.h"
#include "cuda/reduce.h"

namespace fusedres {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;
constexpr auto kDouble = torch::headeronly::ScalarType::Double;
constexpr int kMostStages = 128;  // of a launch, which takes them by value

// Tensors with a weight each: stages, or their gradients.
template <class P>
struct Weighted {
  int stages;
  float weights[kMostStages];
  P data[kMostStages];
};

// out = y + sum_i weights[i] stages[i]
struct RkCombineArgs : Weighted<const void*> {
  int64_t count;
  const void* y;
  void* out;
};

// outs[i] = weights[i] grad
struct RkCombineBackwardArgs : Weighted<void*> {
  int64_t count;
  const void* grad;
};

// The norm of sum_i weights[i] stages[i] / (atol + rtol max(|y0|, |y1|)).
struct RkErrorArgs : Weighted<const void*> {
  int64_t count;
  const void *y0, *y1;
  float rtol, atol;
  double off;  // what the tolerances were divided by
  int blocks;
  double* partials;  // of every block, the sum of the squares
  float* out;
};

// sum += sum_i weights[i] stages[i], with the loads of a few stages in flight.
template <class T, int kWidth>
__device__ __forceinline__ void add_stages(const Weighted<const void*>& a, int64_t at, int n, float (&sum)[kWidth]) {
#pragma unroll 4
  for (int stage = 0; stage < a.stages; ++stage) {
    const auto k = load_pack<T, kWidth>(a.data[stage], at, n);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(a.weights[stage], to_float(k.lane[i]), sum[i]);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocksPerProcessor) rk_combine_kernel(const RkCombineArgs a) {
  for_each_pack<kWidth>(a.count, [&](int64_t at, int n) {
    const auto y = load_pack<T, kWidth>(a.y, at, n);
    float sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = to_float(y.lane[i]);
    add_stages<T>(a, at, n, sum);
    store_pack<T>(a.out, at, n, sum);
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocksPerProcessor)
    rk_combine_bwd_kernel(const RkCombineBackwardArgs a) {
  for_each_pack<kWidth>(a.count, [&](int64_t at, int n) {
    const auto grad = load_pack<T, kWidth>(a.grad, at, n);
    for (int stage = 0; stage < a.stages; ++stage) {
      float product[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) product[i] = a.weights[stage] * to_float(grad.lane[i]);
      store_pack<T>(a.data[stage], at, n, product);
    }
  });
}

// Of a block of kFlatThreads; all its threads take part, once in a kernel.
__device__ __forceinline__ double block_sum(double mine) {
  __shared__ double warps[kFlatThreads / kWarpSize];
  mine = warp_sum(mine);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  double sum = 0;
  for (const double warp : warps) sum += warp;
  return sum;
}

// A pack's squares meet in a float; beyond that the sum is in double.
template <class T, int kWidth>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocksPerProcessor) rk_error_kernel(const RkErrorArgs a) {
  double total = 0;
  for_each_pack<kWidth>(a.count, [&](int64_t at, int n) {
    const auto y0 = load_pack<T, kWidth>(a.y0, at, n), y1 = load_pack<T, kWidth>(a.y1, at, n);
    float error[kWidth] = {}, squares = 0;
    add_stages<T>(a, at, n, error);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float size0 = fabsf(to_float(y0.lane[i])), size1 = fabsf(to_float(y1.lane[i]));
      // A NaN in either state is one in the tolerance, as in stock PyTorch's maximum; fmaxf would lose it.
      const float size = size0 > size1 || isnan(size0) ? size0 : size1;
      const float ratio = error[i] / fmaf(a.rtol, size, a.atol);
      if (i < n) squares = fmaf(ratio, ratio, squares);  // beyond the end the tolerance may be zero
    }
    total += static_cast<double>(squares);
  });
  total = block_sum(total);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kFlatThreads) rk_error_merge_kernel(const RkErrorArgs a) {
  double total = 0;
  for (int i = threadIdx.x; i < a.blocks; i += kFlatThreads) total += a.partials[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *a.out = static_cast<float>(sqrt(total / static_cast<double>(a.count)) / a.off);
}

void check_count(const char* op, size_t stages) {
  STD_TORCH_CHECK(stages <= kMostStages, op, ": at most ", kMostStages, " stages, got ", stages);
}

// Checks stages against the state, and hands them over.
void set_stages(const char* op, const Device& device, const Tensor& y, const std::vector<Tensor>& stages,
                const std::vector<double>& weights, Weighted<const void*>& args, std::vector<const void*>& pointers) {
  STD_TORCH_CHECK(stages.size() == weights.size(), op, ": ", stages.size(), " stages and ", weights.size(), " weights");
  check_count(op, stages.size());
  args.stages = static_cast<int>(stages.size());
  for (size_t i = 0; i < stages.size(); ++i) {
    check_matches(op, "a stage", stages[i], y);
    check_flat(op, {&y, &stages[i]});
    args.weights[i] = static_cast<float>(weights[i]);
    args.data[i] = device.in(stages[i]);
    pointers.push_back(args.data[i]);
  }
}

Tensor rk_combine_cuda(const Tensor& y, std::vector<Tensor> stages, std::vector<double> weights) {
  constexpr const char* kOp = "rk_combine_cuda";
  const Device device(y);
  Tensor out = torch::stable::empty_like(y);
  RkCombineArgs args{};
  std::vector<const void*> pointers;
  set_stages(kOp, device, y, stages, weights, args, pointers);
  if (y.numel() == 0) return out;
  check_flat(kOp, {&y, &out});
  args.count = y.numel();
  args.y = device.in(y);
  args.out = device.out(out);
  pointers.push_back(args.y);
  dispatch_flat(kOp, y, pointers, [&](auto vector) {
    using V = decltype(vector);
    const dim3 grid = flat_grid(args.count, V::width);
    rk_combine_kernel<typename V::Element, V::width><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

std::vector<Tensor> rk_combine_backward_cuda(const Tensor& grad, std::vector<double> weights) {
  constexpr const char* kOp = "rk_combine_backward_cuda";
  check_count(kOp, weights.size());
  const Device device(grad);
  std::vector<Tensor> outs;
  RkCombineBackwardArgs args{};
  args.stages = static_cast<int>(weights.size());
  args.count = grad.numel();
  for (size_t i = 0; i < weights.size(); ++i) {
    outs.push_back(torch::stable::empty_like(grad));
    check_flat(kOp, {&grad, &outs.back()});
    args.weights[i] = static_cast<float>(weights[i]);
    args.data[i] = device.out(outs.back());
  }
  if (args.count == 0 || outs.empty()) return outs;
  args.grad = device.in(grad);
  dispatch_flat(kOp, grad, std::vector{args.grad}, [&](auto vector) {
    using V = decltype(vector);
    const dim3 grid = flat_grid(args.count, V::width);
    rk_combine_bwd_kernel<typename V::Element, V::width><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return outs;
}

Tensor rk_error_cuda(const Tensor& y0, const Tensor& y1, std::vector<Tensor> stages, std::vector<double> weights,
                     double rtol, double atol) {
  constexpr const char* kOp = "rk_error_cuda";
  const Device device(y0);
  Tensor out = torch::stable::new_zeros(y0, {}, kFloat);
  check_matches(kOp, "y1", y1, y0);
  RkErrorArgs args{};
  std::vector<const void*> pointers;
  set_stages(kOp, device, y0, stages, weights, args, pointers);
  if (y0.numel() == 0) return out;
  check_flat(kOp, {&y0, &y1});
  args.count = y0.numel();
  args.y0 = device.in(y0);
  args.y1 = device.in(y1);
  args.off = rounded_off(std::max(rtol, atol));
  args.rtol = static_cast<float>(rtol / args.off);
  args.atol = static_cast<float>(atol / args.off);
  args.out = device.both<float>(out);
  pointers.insert(pointers.end(), {args.y0, args.y1});
  dispatch_flat(kOp, y0, pointers, [&](auto vector) {
    using V = decltype(vector);
    const dim3 grid = flat_grid(args.count, V::width);
    args.blocks = static_cast<int>(grid.x);
    Tensor partials = torch::stable::new_empty(y0, {args.blocks}, kDouble);
    args.partials = device.out<double>(partials);
    rk_error_kernel<typename V::Element, V::width><<<grid, kFlatThreads, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
    rk_error_merge_kernel<<<1, kFlatThreads, 0, device.stream()>>>(args);
    FR_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("rk_combine_cuda", TORCH_BOX(&fusedres::rk_combine_cuda));
  m.impl("rk_combine_backward_cuda", TORCH_BOX(&fusedres::rk_combine_backward_cuda));
  m.impl("rk_error_cuda", TORCH_BOX(&fusedres::rk_error_cuda));
}
