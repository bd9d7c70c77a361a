// The rows (mean, rstd, scale, shift) of a batch norm; see fusedres/ops/bn_norm.py. One value per channel: host code.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/scalar.h"

namespace fusedres {
namespace {

Tensor bn_norm_cpu(std::optional<Tensor> stats, double count, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                   std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum, double eps) {
  constexpr const char* kOp = "bn_norm_cpu";
  STD_TORCH_CHECK(stats.has_value() || (running_mean.has_value() && running_var.has_value()), kOp,
                  ": neither batch statistics nor running statistics are given");
  const Tensor& like = stats ? *stats : *running_mean;
  const int64_t channels = like.size(like.dim() - 1);
  const ScalarVector scale_of(kOp, "gamma", gamma, channels), shift_of(kOp, "beta", beta, channels);
  ScalarVector mean_buffer(kOp, "running_mean", running_mean, channels);
  ScalarVector var_buffer(kOp, "running_var", running_var, channels);
  Tensor out = torch::stable::new_empty(like, {4, channels}, torch::headeronly::ScalarType::Float);
  float* rows = out.mutable_data_ptr<float>();
  const float* batch = stats ? stats->const_data_ptr<float>() : nullptr;
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = batch ? batch[c] : mean_buffer.get(c, 0.f);
    const double var = batch ? batch[channels + c] / count : var_buffer.get(c, 1.f);
    if (batch && running_mean) mean_buffer.set(c, (1 - momentum) * mean_buffer.get(c, 0.f) + momentum * mean);
    if (batch && running_var)
      var_buffer.set(c, (1 - momentum) * var_buffer.get(c, 1.f) + momentum * batch[channels + c] / (count - 1));
    const double rstd = 1.0 / std::sqrt(var + eps);
    const double scale = rstd * scale_of.get(c, 1.f);
    rows[c] = static_cast<float>(mean);
    rows[channels + c] = static_cast<float>(rstd);
    rows[2 * channels + c] = static_cast<float>(scale);
    rows[3 * channels + c] = static_cast<float>(shift_of.get(c, 0.f) - mean * scale);
  }
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("bn_norm_cpu", TORCH_BOX(&fusedres::bn_norm_cpu)); }
