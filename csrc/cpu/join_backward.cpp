#include "cpu/join_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/dropout.h"

namespace fusedres {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

// What the two passes are given alike.
struct Given {
  const Tensor& grad;
  const Tensor& y;
  const std::optional<Tensor>&norm, &residual, &res_norm;
  int64_t act;
  double act_param;
  const std::optional<Tensor>& gain;
  bool per_sample;  // whether samples differ in what they are multiplied by or added to

  void check(const char* op) const {
    check_matches(op, "grad", grad, y);
    if (residual) check_matches(op, "residual", *residual, y);
    if (gain) check_per_sample(op, "gain", *gain, y);
    check_activation(op, act);
  }
};

// The kernels' arguments of both passes, and what they point to.
struct Operands {
  Operands(const char* op, const Given& given, Layout layout)
      : spans(Spans::of(given.y, layout)),
        main(op, "norm", given.norm, given.y),
        side(op, "res_norm", given.res_norm, given.y),
        rows(main, given.gain, given.per_sample, given.y) {
    args.dtype = dtype_of(op, given.y);
    args.kind = !given.residual ? Residual::kNone : given.res_norm ? Residual::kAffine : Residual::kPlain;
    args.act = given.act;
    args.act_param = static_cast<float>(given.act_param);
    args.channels_last = layout == Layout::kChannelsLast;
    args.per_sample = given.per_sample;
    args.channels = spans.channels;
    args.plane = spans.plane;
    args.inner = spans.inner;
    const Tensor& residual = given.residual ? *given.residual : given.y;
    args.grad = given.grad.const_data_ptr();
    args.y = given.y.const_data_ptr();
    args.residual = residual.const_data_ptr();
    args.grad_pitch = spans.pitch_of(given.grad);
    args.y_pitch = spans.pitch_of(given.y);
    args.residual_pitch = spans.pitch_of(residual);
    args.mean = main.mean();
    args.scale = rows.scale();
    args.shift = rows.shift();
    args.res_mean = side.mean();
    args.res_scale = side.scale();
    args.res_shift = side.shift();
  }

  Spans spans;
  NormRows main, side;
  GainedRows rows;
  JoinBackwardArgs args{};
};

// ---------------------------------------------------------------------------------------------------------------------
// First pass
// ---------------------------------------------------------------------------------------------------------------------

using ReduceKernel = void(const JoinReduceArgs&, int64_t, int64_t);

// The elements of a partial.
Block block_of(const Spans& spans, const Piece& piece, int64_t run_length) {
  if (spans.layout == Layout::kChannelsLast) {
    const int64_t pixel = piece.run * run_length + piece.offset;
    return {pixel, pixel + piece.size, 0, spans.inner};
  }
  return {piece.run * spans.channels, (piece.run + 1) * spans.channels, piece.offset, piece.size};
}

// Partials [begin, end) where there is a dropout, but for its scale: that is a factor of the sums, which so take no
// rounded products.
void reduce_masked(const Dropout& dropout, const Spans& spans, const JoinReduceArgs& args, ReduceKernel* run,
                   int64_t begin, int64_t end) {
  BlockRoom room;
  for (int64_t part = begin; part < end; ++part) {
    const Block block = block_of(spans, piece_at(args.pieces, part), args.pieces.length);
    const Keep keep = dropout.draw(spans, block, room.bits);
    Keep unscaled = keep;
    unscaled.scale = 1.f;
    JoinReduceArgs masked = args;
    dropout.mask_gradient(unscaled, block, masked, room.gradient);
    run(masked, part, part + 1);
    if (args.emit) dropout.multiply(keep, block, args.dtype, args.emit, spans.inner);
  }
}

std::tuple<Tensor, Tensor> join_backward_reduce_cpu(const Tensor& grad, const Tensor& y, std::optional<Tensor> norm,
                                                    std::optional<Tensor> residual, std::optional<Tensor> res_norm,
                                                    int64_t act, double act_param, bool emit,
                                                    std::optional<Tensor> gain, double dropout,
                                                    std::optional<Tensor> seed) {
  constexpr const char* kOp = "join_backward_reduce_cpu";
  const Given given{grad, y, norm, residual, res_norm, act, act_param, gain, gain.has_value()};
  given.check(kOp);
  const Dropout drop(kOp, dropout, seed);
  Tensor out = gain ? torch::stable::new_zeros(y, {kReduceSums, y.size(0), y.size(1)}, kFloat)
                    : torch::stable::new_zeros(y, {kReduceSums, y.size(1)}, kFloat);
  Tensor emitted = emit ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {out, emitted};
  const Layout layout = shared_layout(
      kOp, {{"y", &y}, {"grad", &grad}, {"residual", pointer_to(residual)}, {"y", emit ? &emitted : nullptr}});
  const Operands operands(kOp, given, layout);
  const Spans& spans = operands.spans;
  const Cut cut(spans, gain.has_value(), layout == Layout::kChannelsLast ? kReduceRows : kReducePlane);
  JoinReduceArgs args{};
  static_cast<JoinBackwardArgs&>(args) = operands.args;
  args.pieces = cut.pieces;
  args.parts = cut.parts;
  std::vector<float> sums(kReduceSums * args.parts * args.channels);
  args.sums = sums.data();
  args.emit = emit ? emitted.mutable_data_ptr() : nullptr;
  const auto run = FR_FOR_ACTIVE_ISA(join_reduce_range);
  parallel_over(args.parts, y.numel() / args.parts, [&](int64_t begin, int64_t end) {
    if (drop.active()) return reduce_masked(drop, spans, args, run, begin, end);
    run(args, begin, end);
  });

  const int64_t per_group = cut.parts_per_group();
  const JoinReduceMergeArgs merge{args.channels,
                                  cut.groups,
                                  per_group,
                                  args.sums,
                                  operands.main.rstd(),
                                  operands.side.rstd(),
                                  drop.active() ? drop.scale() : 1.0,
                                  out.mutable_data_ptr<float>()};
  const auto run_merge = FR_FOR_ACTIVE_ISA(join_reduce_merge_range);
  parallel_over(cut.groups * args.channels, per_group,
                [&](int64_t begin, int64_t end) { run_merge(merge, begin, end); });
  return {out, emitted};
}

// ---------------------------------------------------------------------------------------------------------------------
// Second pass
// ---------------------------------------------------------------------------------------------------------------------

// The terms of a gradient that come through the norm's statistics, for g the gradient behind it:
// slope = -scale rstd sum g yhat / n and offset = -scale sum g / n. Where the statistics are constants, there are none.
class StatsTerms {
 public:
  StatsTerms(const NormRows& norm, const float* dbeta, const float* dgamma, double count, int64_t channels,
             bool training)
      : channels_(channels), slope_(training ? channels : 0), offset_(channels, 0.f) {
    if (!training) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double share = static_cast<double>(norm.scale()[c]) / count;
      slope_[c] = static_cast<float>(-share * static_cast<double>(norm.rstd()[c]) * dgamma[c]);
      offset_[c] = static_cast<float>(-share * dbeta[c]);
    }
  }

  // Gives every sample a row of offsets, with scale times its own gradient in it if there is one.
  void per_sample(const NormRows& norm, int64_t samples, const std::optional<Tensor>& own) {
    const std::vector<float> shared = offset_;
    offset_.resize(samples * channels_);
    const float* terms = own ? own->const_data_ptr<float>() : nullptr;
    for (int64_t i = 0; i < samples * channels_; i += channels_)
      for (int64_t c = 0; c < channels_; ++c)
        offset_[i + c] = shared[c] + (terms ? norm.scale()[c] * terms[i + c] : 0.f);
  }

  const float* slope() const { return slope_.empty() ? nullptr : slope_.data(); }
  const float* offset() const { return offset_.data(); }

 private:
  int64_t channels_;
  std::vector<float> slope_, offset_;
};

// `side`: whether the residual's norm has sums too; `apart`: whether its sum of the gradient is not the main operand's.
void check_sums(const char* op, const Tensor& sums, const Tensor& y, bool side, bool apart) {
  const int64_t least = apart ? kReduceSums + 1 : side ? kReduceSums : kReduceSums - 1;
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) >= least && sums.size(0) <= kReduceSums + 1 &&
                      sums.size(1) == y.size(1) && sums.is_contiguous() && sums.scalar_type() == kFloat,
                  op, ": sums must be a contiguous float32 tensor of shape [R, ", y.size(1), "] with R from ", least,
                  " to ", kReduceSums + 1,
                  apart ? ": the residual's norm is in training beside a gain or an offset" : "");
}

std::tuple<Tensor, Tensor> join_backward_apply_cpu(const Tensor& grad, const Tensor& y, std::optional<Tensor> norm,
                                                   std::optional<Tensor> residual, std::optional<Tensor> res_norm,
                                                   int64_t act, double act_param, std::optional<Tensor> sums,
                                                   double count, bool training, bool res_training, bool need_residual,
                                                   std::optional<Tensor> gain, double dropout,
                                                   std::optional<Tensor> seed, std::optional<Tensor> offset,
                                                   std::optional<Tensor> addend, std::optional<Tensor> into) {
  constexpr const char* kOp = "join_backward_apply_cpu";
  const bool per_sample = gain || offset;
  const Given given{grad, y, norm, residual, res_norm, act, act_param, gain, per_sample};
  given.check(kOp);
  if (offset) check_per_sample(kOp, "offset", *offset, y);
  if (addend) check_matches(kOp, "addend", *addend, y);
  if (into) check_matches(kOp, "into", *into, y);
  training = training && norm.has_value();
  res_training = res_training && residual.has_value() && res_norm.has_value();
  STD_TORCH_CHECK(sums.has_value() || !(training || res_training), kOp, ": batch statistics need the sums");
  if (sums) check_sums(kOp, *sums, y, res_training, res_training && per_sample);
  const Dropout drop(kOp, dropout, seed);

  const bool writes_residual = residual.has_value() && need_residual;
  Tensor grad_y = into ? torch::stable::new_empty(y, {0}) : torch::stable::empty_like(y);
  Tensor grad_residual = writes_residual ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {grad_y, grad_residual};
  Tensor& target = into ? *into : grad_y;
  const Layout layout = shared_layout(kOp, {{"y", &y},
                                            {"grad", &grad},
                                            {"residual", pointer_to(residual)},
                                            {"addend", pointer_to(addend)},
                                            {into ? "into" : "y", &target},
                                            {"y", writes_residual ? &grad_residual : nullptr}});
  const Operands operands(kOp, given, layout);
  const Spans& spans = operands.spans;
  const auto sum = [&](int64_t row) { return sums ? sums->const_data_ptr<float>() + row * spans.channels : nullptr; };
  const int64_t total = sums && sums->size(0) > kReduceSums ? kReduceSums : 0;  // the row of sum g
  StatsTerms main(operands.main, sum(0), sum(1), count, spans.channels, training);
  const StatsTerms side(operands.side, sum(total), sum(2), count, spans.channels, res_training);
  if (per_sample) main.per_sample(operands.main, spans.samples(), offset);

  JoinApplyArgs args{};
  static_cast<JoinBackwardArgs&>(args) = operands.args;
  args.slope = main.slope();
  args.offset = main.offset();
  args.res_slope = side.slope();
  args.res_offset = side.offset();
  args.addend = addend ? addend->const_data_ptr() : nullptr;
  args.grad_y = target.mutable_data_ptr();
  args.grad_residual = writes_residual ? grad_residual.mutable_data_ptr() : nullptr;
  args.addend_pitch = addend ? spans.pitch_of(*addend) : 0;
  args.grad_y_pitch = spans.pitch_of(target);
  const auto run = FR_FOR_ACTIVE_ISA(join_apply_range);
  parallel_over(spans.outer, spans.inner, [&](int64_t begin, int64_t end) {
    if (!drop.active()) return run(args, begin, end);
    BlockRoom room;
    for_each_block(spans, begin, end, [&](const Block& block) {
      JoinApplyArgs masked = args;
      drop.mask_gradient(drop.draw(spans, block, room.bits), block, masked, room.gradient);
      run(masked, block.begin, block.end);
    });
  });
  return {grad_y, grad_residual};
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("join_backward_reduce_cpu", TORCH_BOX(&fusedres::join_backward_reduce_cpu));
  m.impl("join_backward_apply_cpu", TORCH_BOX(&fusedres::join_backward_apply_cpu));
}
