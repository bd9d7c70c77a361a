#include <torch/csrc/stable/library.h>

#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

Tensor conv_winograd_pack_cpu(const Tensor& weight) {
  constexpr const char* kOp = "conv_winograd_pack_cpu";
  STD_TORCH_CHECK(weight.dim() == 4, kOp, ": weight must be [K, C, 3, 3]");
  const int64_t panels = (weight.size(0) + kPanel - 1) / kPanel;
  Tensor packed = torch::stable::new_empty(weight, {panels, kPoints, weight.size(1), kPanel});
  WinogradWeights::pack(kOp, weight, false, false, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor conv_winograd_cpu(const Tensor& x, const Tensor& packed, int64_t filters, std::optional<Tensor> bias,
                         std::optional<Tensor> residual, int64_t act, double act_param, std::vector<int64_t> padding) {
  constexpr const char* kOp = "conv_winograd_cpu";
  STD_TORCH_CHECK(x.dim() == 4 && packed.dim() == 4 && packed.is_contiguous() &&
                      packed.scalar_type() == torch::headeronly::ScalarType::Float && packed.size(1) == kPoints &&
                      packed.size(2) == x.size(1) && packed.size(3) == kPanel && filters > 0 &&
                      packed.size(0) == (filters + kPanel - 1) / kPanel,
                  kOp, ": packed must be conv_winograd_pack's of [", filters, ", ", x.size(1), ", 3, 3]");
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, kOp,
                  ": padding must be two values that are not negative");
  check_activation(kOp, act);
  WinogradArgs args{};
  set_geometry(args, kOp, x, filters, padding[0], padding[1]);
  args.source = WinogradSource::kPlain;
  args.x = pixels_of(kOp, "x", x);
  args.weights = packed.const_data_ptr<float>();
  set_bias(args, kOp, bias);
  Tensor out = set_output(args, kOp, x, std::nullopt);
  if (residual) {
    check_matches(kOp, "residual", *residual, out);
    args.residual = pixels_of(kOp, "residual", *residual);
  }
  args.result = WinogradResult::kJoin;
  args.out_act = act;
  args.out_act_param = static_cast<float>(act_param);
  run_winograd(kOp, args, nullptr, nullptr, nullptr);
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("conv_winograd_pack_cpu", TORCH_BOX(&fusedres::conv_winograd_pack_cpu));
  m.impl("conv_winograd_cpu", TORCH_BOX(&fusedres::conv_winograd_cpu));
}
