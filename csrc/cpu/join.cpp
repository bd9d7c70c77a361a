#include "cpu/join.h"

#include <torch/csrc/stable/library.h>

#include "cpu/dropout.h"

namespace fusedres {
namespace {

Tensor join_cpu(const Tensor& y, std::optional<Tensor> norm, std::optional<Tensor> residual,
                std::optional<Tensor> res_norm, int64_t act, double act_param, std::optional<Tensor> gain,
                double dropout, std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_cpu";
  Tensor out = torch::stable::empty_like(y);
  if (residual) check_matches(kOp, "residual", *residual, y);
  if (gain) check_per_sample(kOp, "gain", *gain, y);
  check_activation(kOp, act);
  const Dropout drop(kOp, dropout, seed);
  if (y.numel() == 0) return out;
  const Layout layout = shared_layout(kOp, {{"y", &y}, {"residual", pointer_to(residual)}, {"y", &out}});
  const Spans spans = Spans::of(y, layout);
  const NormRows main(kOp, "norm", norm, y);
  const NormRows side(kOp, "res_norm", res_norm, y);
  const GainedRows rows(main, gain, gain.has_value(), y);
  JoinArgs args{};
  args.dtype = dtype_of(kOp, y);
  args.kind = !residual ? Residual::kNone : res_norm ? Residual::kAffine : Residual::kPlain;
  args.act = act;
  args.act_param = static_cast<float>(act_param);
  args.per_lane = layout == Layout::kChannelsLast;
  args.per_sample = gain.has_value();
  args.inner = spans.inner;
  args.channels = spans.channels;
  args.plane = spans.plane;
  args.y = y.const_data_ptr();
  args.residual = residual ? residual->const_data_ptr() : y.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.y_pitch = spans.pitch_of(y);
  args.residual_pitch = residual ? spans.pitch_of(*residual) : args.y_pitch;
  args.scale = rows.scale();
  args.shift = rows.shift();
  args.res_scale = side.scale();
  args.res_shift = side.shift();
  const auto run = FR_FOR_ACTIVE_ISA(join_range);
  parallel_over(spans.outer, spans.inner, [&](int64_t begin, int64_t end) {
    if (!drop.active()) return run(args, begin, end);
    BlockRoom room;
    for_each_block(spans, begin, end, [&](const Block& block) {
      run(args, block.begin, block.end);
      drop.multiply(drop.draw(spans, block, room.bits), block, args.dtype, args.out, spans.inner);
    });
  });
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("join_cpu", TORCH_BOX(&fusedres::join_cpu)); }
