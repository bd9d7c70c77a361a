#include "cpu/join_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/parallel.h"

namespace fusedres {
namespace {

// The operands that both passes share, checked once.
struct Operands {
  Operands(const char* op, const Tensor& grad, const Tensor& y, const std::optional<Tensor>& norm,
           const std::optional<Tensor>& residual, const std::optional<Tensor>& res_norm, int64_t act, double act_param)
      : spans(Spans::of(y, common_layout(op, {&y, &grad, pointer_to(residual)}))),
        main(op, "norm", norm, y),
        side(op, "res_norm", res_norm, y) {
    check_matches(op, "grad", grad, y);
    if (residual) check_matches(op, "residual", *residual, y);
    check_activation(op, act);
    args.dtype = dtype_of(op, y);
    args.kind = !residual ? Residual::kNone : res_norm ? Residual::kAffine : Residual::kPlain;
    args.act = act;
    args.act_param = static_cast<float>(act_param);
    args.channels_last = spans.layout == Layout::kChannelsLast;
    args.channels = spans.channels;
    args.pixels = spans.pixels;
    args.plane = spans.plane;
    args.inner = spans.inner;
    args.grad = grad.const_data_ptr();
    args.y = y.const_data_ptr();
    args.residual = residual ? residual->const_data_ptr() : args.y;
    args.mean = main.mean();
    args.scale = main.scale();
    args.shift = main.shift();
    args.res_mean = side.mean();
    args.res_scale = side.scale();
    args.res_shift = side.shift();
  }

  Spans spans;
  NormRows main, side;
  JoinBackwardArgs args{};
};

int64_t parts_of(const Spans& spans) {
  const auto pieces = [](int64_t length, int64_t piece) { return (length + piece - 1) / piece; };
  if (spans.layout == Layout::kChannelsLast) return pieces(spans.pixels, kReduceRows);
  return spans.pixels / spans.plane * pieces(spans.plane, kReducePlane);
}

std::tuple<Tensor, Tensor> join_backward_reduce_cpu(const Tensor& grad, const Tensor& y, std::optional<Tensor> norm,
                                                    std::optional<Tensor> residual, std::optional<Tensor> res_norm,
                                                    int64_t act, double act_param, bool emit,
                                                    std::optional<Tensor> gain, double dropout,
                                                    std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_backward_reduce_cpu";
  STD_TORCH_CHECK(!gain.has_value() && !seed.has_value() && dropout == 0, kOp, ": gain and dropout have no kernel yet");
  Tensor out = torch::stable::new_zeros(y, {kReduceSums, y.size(1)}, torch::headeronly::ScalarType::Float);
  Tensor emitted = emit ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {out, emitted};
  const Operands operands(kOp, grad, y, norm, residual, res_norm, act, act_param);
  JoinReduceArgs args{};
  static_cast<JoinBackwardArgs&>(args) = operands.args;
  args.parts = parts_of(operands.spans);
  std::vector<float> sums(kReduceSums * args.parts * args.channels);
  args.sums = sums.data();
  args.emit = emit ? emitted.mutable_data_ptr() : nullptr;
  const auto run = FR_FOR_ACTIVE_ISA(join_reduce_range);
  parallel_over(args.parts, y.numel() / args.parts, [&](int64_t begin, int64_t end) { run(args, begin, end); });

  const JoinReduceMergeArgs merge{args.channels,        args.parts,           args.sums,
                                  operands.main.rstd(), operands.side.rstd(), out.mutable_data_ptr<float>()};
  const auto run_merge = FR_FOR_ACTIVE_ISA(join_reduce_merge_range);
  parallel_over(args.channels, args.parts, [&](int64_t begin, int64_t end) { run_merge(merge, begin, end); });
  return {out, emitted};
}

// slope = -scale rstd^2 sum g (y - mean) / n and offset = -scale sum g / n; both zero where the statistics are
// constants.
class StatsTerms {
 public:
  // Row 0 of `sums` is dbeta, row `dgamma_row` is dgamma.
  StatsTerms(const NormRows& norm, const float* sums, int dgamma_row, double count, int64_t channels, bool training)
      : terms_(2 * channels, 0.f), channels_(channels) {
    if (!training) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double share = static_cast<double>(norm.scale()[c]) / count;
      const double rstd = norm.rstd()[c];
      terms_[c] = static_cast<float>(-share * rstd * sums[dgamma_row * channels + c]);
      terms_[channels + c] = static_cast<float>(-share * sums[c]);
    }
  }
  const float* slope() const { return terms_.data(); }
  const float* offset() const { return terms_.data() + channels_; }

 private:
  std::vector<float> terms_;
  int64_t channels_;
};

std::tuple<Tensor, Tensor> join_backward_apply_cpu(const Tensor& grad, const Tensor& y, std::optional<Tensor> norm,
                                                   std::optional<Tensor> residual, std::optional<Tensor> res_norm,
                                                   int64_t act, double act_param, std::optional<Tensor> sums,
                                                   double count, bool training, bool res_training, bool need_residual,
                                                   std::optional<Tensor> gain, double dropout,
                                                   std::optional<Tensor> seed, std::optional<Tensor> offset,
                                                   std::optional<Tensor> addend, std::optional<Tensor> into) {
  constexpr const char* kOp = "join_backward_apply_cpu";
  STD_TORCH_CHECK(!gain.has_value() && !seed.has_value() && dropout == 0 && !offset.has_value() &&
                      !addend.has_value() && !into.has_value(),
                  kOp, ": gain and dropout have no kernel yet");
  const bool writes_residual = residual.has_value() && need_residual;
  Tensor grad_y = torch::stable::empty_like(y);
  Tensor grad_residual = writes_residual ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {grad_y, grad_residual};
  STD_TORCH_CHECK(sums.has_value() || !(training || res_training), kOp, ": batch statistics need the sums");
  const Operands operands(kOp, grad, y, norm, residual, res_norm, act, act_param);
  const int64_t c = operands.spans.channels;
  const float* sum_rows = sums ? sums->const_data_ptr<float>() : nullptr;
  const StatsTerms main(operands.main, sum_rows, 1, count, c, training);
  const StatsTerms side(operands.side, sum_rows, 2, count, c, res_training);
  JoinApplyArgs args{};
  static_cast<JoinBackwardArgs&>(args) = operands.args;
  args.training = training;
  args.res_training = res_training;
  args.slope = main.slope();
  args.offset = main.offset();
  args.res_slope = side.slope();
  args.res_offset = side.offset();
  args.grad_y = grad_y.mutable_data_ptr();
  args.grad_residual = writes_residual ? grad_residual.mutable_data_ptr() : nullptr;
  const auto run = FR_FOR_ACTIVE_ISA(join_apply_range);
  parallel_over(operands.spans.outer, args.inner, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {grad_y, grad_residual};
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("join_backward_reduce_cpu", TORCH_BOX(&fusedres::join_backward_reduce_cpu));
  m.impl("join_backward_apply_cpu", TORCH_BOX(&fusedres::join_backward_apply_cpu));
}
