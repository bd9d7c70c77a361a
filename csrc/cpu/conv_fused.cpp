#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

using Numbers = std::vector<int64_t>;

// The input: a pending value.
void set_input(WinogradArgs& a, const char* op, const Tensor& x, const std::optional<Tensor>& norm,
               const NormRows& rows, int64_t act, double act_param) {
  check_activation(op, act);
  a.source = norm || act != Identity::kCode ? WinogradSource::kPending : WinogradSource::kPlain;
  a.act = act;
  a.act_param = static_cast<float>(act_param);
  a.x = pixels_of(op, "x", x);
  a.scale = rows.scale();
  a.shift = rows.shift();
}

std::tuple<Tensor, Tensor> conv_fused_fprop_cpu(const Tensor& x, std::optional<Tensor> norm, int64_t act,
                                                double act_param, const Tensor& weight, std::optional<Tensor> bias,
                                                Numbers stride, Numbers padding, Numbers dilation, bool want_stats,
                                                std::optional<Tensor> into) {
  constexpr const char* kOp = "conv_fused_fprop_cpu";
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  check_winograd(kOp, weight, stride, padding, dilation);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == weight.size(1), kOp, ": x must be [N, ", weight.size(1), ", H, W]");
  const NormRows rows(kOp, "norm", norm, x);
  WinogradArgs args{};
  set_geometry(args, kOp, x, weight.size(0), padding[0], padding[1]);
  set_input(args, kOp, x, norm, rows, act, act_param);
  set_bias(args, kOp, bias);
  Tensor out = set_output(args, kOp, x, into);
  Tensor stats = torch::stable::new_empty(x, {want_stats ? 2 : 0, want_stats ? args.filters : 0}, kFloat);
  const WinogradWeights weights(kOp, weight, false);
  args.weights = weights.packed();
  args.taps = weights.taps();
  args.result = WinogradResult::kStatistics;
  run_winograd(kOp, args, want_stats ? stats.mutable_data_ptr<float>() : nullptr, nullptr, nullptr);
  return {into ? torch::stable::new_empty(x, {0}) : out, want_stats ? stats : torch::stable::new_empty(x, {0})};
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("conv_fused_fprop_cpu", TORCH_BOX(&fusedres::conv_fused_fprop_cpu));
}
