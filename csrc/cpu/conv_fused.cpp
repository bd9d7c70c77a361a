#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

using Numbers = std::vector<int64_t>;

// The input of both ops: a pending value.
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

void set_bias(WinogradArgs& a, const char* op, const std::optional<Tensor>& bias) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == a.filters && bias->is_contiguous() &&
                      bias->scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": bias must be a contiguous float32 tensor of shape [", a.filters, "]");
  a.bias = bias->const_data_ptr<float>();
}

// Where the result goes: `into`, or a new tensor.
Tensor set_output(WinogradArgs& a, const char* op, const Tensor& x, std::optional<Tensor>& into) {
  const int64_t shape[] = {x.size(0), a.filters, a.out_height, a.out_width};
  Tensor out = into ? *into : new_channels_last(x, shape[0], shape[1], shape[2], shape[3]);
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(out.dim() == 4 && out.size(d) == shape[d], op, ": into must be [", shape[0], ", ", shape[1], ", ",
                    shape[2], ", ", shape[3], "]");
  a.out_pitch = pixels_of(op, "into", out).pitch;
  a.out = out.mutable_data_ptr<float>();
  return out;
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

Tensor conv_fused_join_cpu(const Tensor& x, std::optional<Tensor> norm, int64_t act, double act_param,
                           const Tensor& weight, std::optional<Tensor> bias, Numbers stride, Numbers padding,
                           Numbers dilation, std::optional<Tensor> out_norm, std::optional<Tensor> residual,
                           std::optional<Tensor> res_norm, int64_t out_act, double out_act_param,
                           std::optional<Tensor> into) {
  constexpr const char* kOp = "conv_fused_join_cpu";
  check_winograd(kOp, weight, stride, padding, dilation);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == weight.size(1), kOp, ": x must be [N, ", weight.size(1), ", H, W]");
  const NormRows rows(kOp, "norm", norm, x);
  WinogradArgs args{};
  set_geometry(args, kOp, x, weight.size(0), padding[0], padding[1]);
  set_input(args, kOp, x, norm, rows, act, act_param);
  set_bias(args, kOp, bias);
  Tensor out = set_output(args, kOp, x, into);
  const NormRows out_rows(kOp, "out_norm", out_norm, out), side(kOp, "res_norm", res_norm, out);
  check_activation(kOp, out_act);
  if (residual) {
    check_matches(kOp, "residual", *residual, out);
    args.residual = pixels_of(kOp, "residual", *residual);
  }
  args.residual_kind = !residual ? Residual::kNone : res_norm ? Residual::kAffine : Residual::kPlain;
  args.out_scale = out_rows.scale(), args.out_shift = out_rows.shift();
  args.res_scale = side.scale(), args.res_shift = side.shift();
  args.out_act = out_act;
  args.out_act_param = static_cast<float>(out_act_param);
  const WinogradWeights weights(kOp, weight, false);
  args.weights = weights.packed();
  args.taps = weights.taps();
  args.result = WinogradResult::kJoin;
  run_winograd(kOp, args, nullptr, nullptr, nullptr);
  return into ? torch::stable::new_empty(x, {0}) : out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("conv_fused_fprop_cpu", TORCH_BOX(&fusedres::conv_fused_fprop_cpu));
  m.impl("conv_fused_join_cpu", TORCH_BOX(&fusedres::conv_fused_join_cpu));
}
