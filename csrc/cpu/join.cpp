#include "cpu/join.h"

#include <torch/csrc/stable/library.h>

#include "cpu/parallel.h"

namespace fusedres {
namespace {

Tensor join_cpu(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                std::optional<Tensor> res_norm, int64_t act, double act_param, std::optional<Tensor> gain,
                double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_cpu";
  STD_TORCH_CHECK(!gain.has_value() && !seed.has_value() && dropout == 0, kOp, ": gain and dropout have no kernel yet");
  Tensor out = torch::stable::empty_like(y);
  if (residual) check_matches(kOp, "residual", *residual, y);
  check_activation(kOp, act);
  if (y.numel() == 0) return out;
  const Spans spans = Spans::of(y, common_layout(kOp, {&y, pointer_to(residual), &out}));
  const NormRows main(kOp, "norm", norm, y);
  const NormRows side(kOp, "res_norm", res_norm, y);
  JoinArgs args{};
  args.dtype = dtype_of(kOp, y);
  args.kind = !residual ? Residual::kNone : res_norm ? Residual::kAffine : Residual::kPlain;
  args.act = act;
  args.act_param = static_cast<float>(act_param);
  args.per_lane = spans.layout == Layout::kChannelsLast;
  args.inner = spans.inner;
  args.channels = spans.channels;
  args.y = y.const_data_ptr();
  args.residual = residual ? residual->const_data_ptr() : y.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.scale = main.scale();
  args.shift = main.shift();
  args.res_scale = side.scale();
  args.res_shift = side.shift();
  const auto run = FR_FOR_ACTIVE_ISA(join_range);
  parallel_over(spans.outer, spans.inner, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("join_cpu", TORCH_BOX(&fusedres::join_cpu)); }
