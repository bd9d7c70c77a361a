// The rows (mean, rstd, scale, shift) of a batch norm; see fusedres/ops/bn_norm.py. One value per channel: host code.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/scalar.h"

namespace fusedres {
namespace {

// Mean and M2 of every channel: Chan's merge of partials of equally many values each. Empty without statistics.
struct Merged {
  Merged(const char* op, const std::optional<Tensor>& stats, double count) {
    if (!stats) return;
    STD_TORCH_CHECK((stats->dim() == 2 || stats->dim() == 3) && stats->size(0) == 2 && stats->is_contiguous() &&
                        stats->scalar_type() == torch::headeronly::ScalarType::Float,
                    op, ": stats must be a contiguous float32 tensor of shape [2, C] or [2, K, C]");
    const int64_t channels = stats->size(stats->dim() - 1), partials = stats->dim() == 2 ? 1 : stats->size(1);
    const float* means = stats->const_data_ptr<float>();
    const float* m2s = means + partials * channels;
    mean.assign(channels, 0.);
    m2.assign(channels, 0.);
    for (int64_t k = 0; k < partials; ++k)
      for (int64_t c = 0; c < channels; ++c) mean[c] += means[k * channels + c];
    for (double& m : mean) m /= static_cast<double>(partials);
    const double each = count / static_cast<double>(partials);
    for (int64_t k = 0; k < partials; ++k)
      for (int64_t c = 0; c < channels; ++c) {
        // A single partial stays as it is: the difference of two infinities would be NaN.
        const double d = partials == 1 ? 0. : means[k * channels + c] - mean[c];
        m2[c] += m2s[k * channels + c] + each * d * d;
      }
  }

  std::vector<double> mean, m2;
};

Tensor bn_norm_cpu(std::optional<Tensor> stats, double count, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                   std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum, double eps) {
  constexpr const char* kOp = "bn_norm_cpu";
  STD_TORCH_CHECK(stats.has_value() || (running_mean.has_value() && running_var.has_value()), kOp,
                  ": neither batch statistics nor running statistics are given");
  const Tensor& like = stats ? *stats : *running_mean;
  STD_TORCH_CHECK(like.dim() > 0, kOp, ": ", stats ? "stats" : "running_mean", " must have a dimension of channels");
  const int64_t channels = like.size(like.dim() - 1);
  const ScalarVector scale_of(kOp, "gamma", gamma, channels), shift_of(kOp, "beta", beta, channels);
  ScalarVector mean_buffer(kOp, "running_mean", running_mean, channels);
  ScalarVector var_buffer(kOp, "running_var", running_var, channels);
  Tensor out = torch::stable::new_empty(like, {4, channels}, torch::headeronly::ScalarType::Float);
  float* rows = out.mutable_data_ptr<float>();
  const Merged batch(kOp, stats, count);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = stats ? batch.mean[c] : mean_buffer.get(c, 0.f);
    const double var = stats ? batch.m2[c] / count : var_buffer.get(c, 1.f);
    if (stats && running_mean) mean_buffer.set(c, (1 - momentum) * mean_buffer.get(c, 0.f) + momentum * mean);
    if (stats && running_var)
      var_buffer.set(c, (1 - momentum) * var_buffer.get(c, 1.f) + momentum * batch.m2[c] / (count - 1));
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
