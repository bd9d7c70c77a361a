// The rows (mean, rstd, scale, shift) of a batch norm on CUDA; see fusedres/ops/bn_norm.py for the formula.
#include <torch/csrc/stable/library.h>

#include "cuda/bn_norm.h"

namespace fusedres {
namespace {

constexpr int kChannels = 32;  // of a block
constexpr int kSlices = 8;     // threads that share a channel's partials

struct MergeArgs {
  const float* stats;  // [2, partials, channels], or null
  int64_t partials;
  NormArgs norm;
};

// Mean and M2 of a channel: Chan's merge of partials of equally many values. All threads of the block take part.
__device__ __forceinline__ void merge(const MergeArgs& a, int64_t channel, double& mean, double& m2) {
  __shared__ double sums[kSlices][kChannels + 1];
  const auto total = [&](double mine) {
    sums[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < kSlices; ++i) sum += sums[i][threadIdx.x];
    __syncthreads();
    return sum;
  };
  const bool inside = channel < a.norm.channels;
  const float* means = a.stats + channel;
  const float* m2s = means + a.partials * a.norm.channels;
  double sum = 0;
  for (int64_t k = threadIdx.y; inside && k < a.partials; k += kSlices) sum += means[k * a.norm.channels];
  mean = total(sum) / static_cast<double>(a.partials);
  const double each = a.norm.count / static_cast<double>(a.partials);
  sum = 0;
  for (int64_t k = threadIdx.y; inside && k < a.partials; k += kSlices) {
    // A single partial stays as it is: the difference of two infinities would be NaN.
    const double d = a.partials == 1 ? 0. : means[k * a.norm.channels] - mean;
    sum += m2s[k * a.norm.channels] + each * d * d;
  }
  m2 = total(sum);
}

__global__ void __launch_bounds__(kChannels* kSlices) bn_norm_kernel(const MergeArgs a) {
  const int64_t c = int64_t{blockIdx.x} * kChannels + threadIdx.x;
  double mean = 0, m2 = 0;
  if (a.stats != nullptr) merge(a, c, mean, m2);
  if (c >= a.norm.channels || threadIdx.y != 0) return;
  if (a.stats == nullptr)
    a.norm.write_constant(c);
  else
    a.norm.write(c, mean, m2);
}

}  // namespace

Tensor bn_norm_cuda(std::optional<Tensor> stats, double count, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                    std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum,
                    double eps) {
  constexpr const char* kOp = "bn_norm_cuda";
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(stats.has_value() || (running_mean.has_value() && running_var.has_value()), kOp,
                  ": neither batch statistics nor running statistics are given");
  if (stats)
    STD_TORCH_CHECK((stats->dim() == 2 || stats->dim() == 3) && stats->size(0) == 2 && stats->is_contiguous() &&
                        stats->scalar_type() == kFloat,
                    kOp, ": stats must be a contiguous float32 tensor of shape [2, C] or [2, K, C]");
  const Tensor& like = stats ? *stats : *running_mean;
  STD_TORCH_CHECK(like.dim() > 0, kOp, ": ", stats ? "stats" : "running_mean", " must have a dimension of channels");
  const int64_t channels = like.size(like.dim() - 1);
  const Device device(like);
  Tensor out = torch::stable::new_empty(like, {4, channels}, kFloat);
  MergeArgs args{};
  args.stats = device.in<float>(stats);
  args.partials = stats && stats->dim() == 3 ? stats->size(1) : 1;
  args.norm = norm_args(kOp, device, channels, count, gamma, beta, running_mean, running_var, momentum, eps, out);
  if (channels == 0) return out;
  const dim3 grid(as_dim(ceil_div(channels, kChannels)));
  bn_norm_kernel<<<grid, dim3(kChannels, kSlices), 0, device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  return out;
}

}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("bn_norm_cuda", TORCH_BOX(&fusedres::bn_norm_cuda)); }
