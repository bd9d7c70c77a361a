// The rows of a batch norm from its statistics, channel by channel; see fusedres/ops/bn_norm.py for the formula.
#pragma once

#include <optional>

#include "cuda/launch.h"
#include "cuda/vector.h"

namespace fusedres {

// fusedres::bn_norm_cuda, for ops that fall back to it.
Tensor bn_norm_cuda(std::optional<Tensor> stats, double count, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                    std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum, double eps);

namespace {

struct NormArgs {
  int64_t channels;
  double count, momentum, eps;
  ChannelVector gamma, beta, running_mean, running_var;
  float* out;  // [4, channels]: mean, rstd, scale, shift

  // From statistics of the batch, which also go into the running ones.
  __device__ __forceinline__ void write(int64_t c, double mean, double m2) const {
    running_mean.set(c, (1 - momentum) * running_mean.get(c, 0.) + momentum * mean);
    running_var.set(c, (1 - momentum) * running_var.get(c, 1.) + momentum * m2 / (count - 1));
    write_rows(c, mean, m2 / count);
  }
  // From the running statistics.
  __device__ __forceinline__ void write_constant(int64_t c) const {
    write_rows(c, running_mean.get(c, 0.), running_var.get(c, 1.));
  }

 private:
  __device__ __forceinline__ void write_rows(int64_t c, double mean, double var) const {
    const double rstd = 1.0 / sqrt(var + eps);
    const double scale = rstd * gamma.get(c, 1.);
    out[c] = static_cast<float>(mean);
    out[channels + c] = static_cast<float>(rstd);
    out[2 * channels + c] = static_cast<float>(scale);
    out[3 * channels + c] = static_cast<float>(beta.get(c, 0.) - mean * scale);
  }
};

inline NormArgs norm_args(const char* op, const Device& device, int64_t channels, double count,
                          std::optional<Tensor>& gamma, std::optional<Tensor>& beta,
                          std::optional<Tensor>& running_mean, std::optional<Tensor>& running_var, double momentum,
                          double eps, Tensor& out) {
  return {channels,
          count,
          momentum,
          eps,
          channel_vector(op, "gamma", device, gamma, channels),
          channel_vector(op, "beta", device, beta, channels),
          channel_vector(op, "running_mean", device, running_mean, channels),
          channel_vector(op, "running_var", device, running_var, channels),
          device.out<float>(out)};
}

}  // namespace
}  // namespace fusedres
