#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

using Numbers = std::vector<int64_t>;

// What the data gradient reads: g, or the norm's input gradient, which is affine in g and y.
void set_gradient(WinogradArgs& a, const char* op, const Tensor& g, const std::optional<Tensor>& y,
                  const std::optional<Tensor>& grad_rows) {
  a.source = grad_rows ? WinogradSource::kGradient : WinogradSource::kPlain;
  a.x = pixels_of(op, "g", g);
  if (!grad_rows) return;
  STD_TORCH_CHECK(y.has_value(), op, ": y must be given with grad_rows");
  check_matches(op, "y", *y, g);
  check_norm(op, "grad_rows", *grad_rows, g);
  a.y = pixels_of(op, "y", *y);
  const float* rows = grad_rows->const_data_ptr<float>();
  a.scale = rows, a.slope = rows + a.channels, a.mean = rows + 2 * a.channels, a.offset = rows + 3 * a.channels;
}

std::tuple<Tensor, Tensor> conv_fused_dgrad_cpu(const Tensor& g, std::optional<Tensor> y,
                                                std::optional<Tensor> grad_rows, const Tensor& weight, const Tensor& x,
                                                std::optional<Tensor> norm, int64_t act, double act_param,
                                                Numbers stride, Numbers padding, Numbers dilation,
                                                std::optional<Tensor> addend, std::optional<Tensor> into) {
  constexpr const char* kOp = "conv_fused_dgrad_cpu";
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  check_winograd(kOp, weight, stride, padding, dilation);
  STD_TORCH_CHECK(padding[0] <= 2 && padding[1] <= 2, kOp, ": padding must be at most 2");
  STD_TORCH_CHECK(g.dim() == 4 && g.size(1) == weight.size(0), kOp, ": g must be [N, ", weight.size(0), ", P, Q]");
  WinogradArgs args{};
  set_geometry(args, kOp, g, weight.size(1), 2 - padding[0], 2 - padding[1]);
  set_gradient(args, kOp, g, y, grad_rows);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == g.size(0) && x.size(1) == args.filters && x.size(2) == args.out_height &&
                      x.size(3) == args.out_width,
                  kOp, ": x must be [", g.size(0), ", ", args.filters, ", ", args.out_height, ", ", args.out_width,
                  "], the input of a convolution with this result");
  check_activation(kOp, act);
  const NormRows rows(kOp, "norm", norm, x);
  args.pending = pixels_of(kOp, "x", x);
  args.out_mean = rows.mean(), args.out_scale = rows.scale(), args.out_shift = rows.shift();
  args.out_act = act;
  args.out_act_param = static_cast<float>(act_param);
  if (addend) {
    check_matches(kOp, "addend", *addend, x);
    args.residual = pixels_of(kOp, "addend", *addend);
  }
  if (into) check_matches(kOp, "into", *into, x);
  Tensor dx = into ? *into : new_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3));
  args.out_pitch = pixels_of(kOp, "into", dx).pitch;
  args.out = dx.mutable_data_ptr<float>();
  Tensor sums = norm ? torch::stable::new_empty(x, {2, args.filters}, kFloat) : torch::stable::new_empty(x, {0});
  const WinogradWeights weights(kOp, weight, true);
  args.weights = weights.packed();
  args.taps = weights.taps();
  args.result = WinogradResult::kGradient;
  run_winograd(kOp, args, nullptr, norm ? sums.mutable_data_ptr<float>() : nullptr, rows.rstd());
  return {into ? torch::stable::new_empty(x, {0}) : dx, sums};
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("conv_fused_dgrad_cpu", TORCH_BOX(&fusedres::conv_fused_dgrad_cpu));
}
