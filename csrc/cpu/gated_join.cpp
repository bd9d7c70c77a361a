#include "cpu/gated_join.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/flat.h"
#include "cpu/parallel.h"

namespace fusedres {
namespace {

Gating gating_of(std::optional<double> threshold) {
  return {threshold.has_value(), static_cast<float>(threshold.value_or(0.0))};
}

Tensor gated_join_cpu(const Tensor& f, const Tensor& logits, const Tensor& x, std::optional<double> threshold) {
  constexpr const char* kOp = "gated_join_cpu";
  check_matches(kOp, "logits", logits, f);
  check_matches(kOp, "x", x, f);
  Tensor out = torch::stable::empty_like(f);
  if (f.numel() == 0) return out;
  check_flat(kOp, {&f, &logits, &x, &out});
  const GatedJoinArgs args{dtype_of(kOp, f),        gating_of(threshold), f.const_data_ptr(),
                           logits.const_data_ptr(), x.const_data_ptr(),   out.mutable_data_ptr()};
  const auto run = FR_FOR_ACTIVE_ISA(gated_join_range);
  parallel_over(f.numel(), 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_join_backward_cpu(const Tensor& grad, const Tensor& logits,
                                                           std::optional<Tensor> f, std::optional<Tensor> x,
                                                           std::optional<double> threshold, bool need_f, bool need_x) {
  constexpr const char* kOp = "gated_join_backward_cpu";
  check_matches(kOp, "logits", logits, grad);
  if (f) check_matches(kOp, "f", *f, grad);
  if (x) check_matches(kOp, "x", *x, grad);
  const bool need_logits = f.has_value() && x.has_value();
  const auto output = [&grad](bool needed) {
    return needed ? torch::stable::empty_like(grad) : torch::stable::new_empty(grad, {0});
  };
  Tensor grad_f = output(need_f), grad_logits = output(need_logits), grad_x = output(need_x);
  if (grad.numel() == 0) return {grad_f, grad_logits, grad_x};
  check_flat(kOp, {&grad, &logits, pointer_to(f), pointer_to(x)});
  GatedJoinBackwardArgs args{};
  args.dtype = dtype_of(kOp, grad);
  args.gating = gating_of(threshold);
  args.grad = grad.const_data_ptr();
  args.logits = logits.const_data_ptr();
  if (need_f) args.grad_f = grad_f.mutable_data_ptr();
  if (need_x) args.grad_x = grad_x.mutable_data_ptr();
  if (need_logits) {
    args.f = f->const_data_ptr();
    args.x = x->const_data_ptr();
    args.grad_logits = grad_logits.mutable_data_ptr();
  }
  const auto run = FR_FOR_ACTIVE_ISA(gated_join_backward_range);
  parallel_over(grad.numel(), 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {grad_f, grad_logits, grad_x};
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("gated_join_cpu", TORCH_BOX(&fusedres::gated_join_cpu));
  m.impl("gated_join_backward_cpu", TORCH_BOX(&fusedres::gated_join_backward_cpu));
}
