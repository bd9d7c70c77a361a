#include "cpu/rk_combine.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/flat.h"
#include "common/tolerance.h"
#include "cpu/parallel.h"

namespace fusedres {
namespace {

// The stages of a step and their weights, checked against the state.
struct Stages {
  Stages(const char* op, const Tensor& y, const std::vector<Tensor>& stages, const std::vector<double>& given)
      : weights(given.begin(), given.end()) {
    STD_TORCH_CHECK(stages.size() == given.size(), op, ": ", stages.size(), " stages and ", given.size(), " weights");
    for (const Tensor& stage : stages) {
      check_matches(op, "a stage", stage, y);
      check_flat(op, {&y, &stage});
      data.push_back(stage.const_data_ptr());
    }
  }

  int64_t count() const { return static_cast<int64_t>(data.size()); }

  std::vector<const void*> data;
  std::vector<float> weights;
};

Tensor rk_combine_cpu(const Tensor& y, std::vector<Tensor> stages, std::vector<double> weights) {
  constexpr const char* kOp = "rk_combine_cpu";
  Tensor out = torch::stable::empty_like(y);
  const Stages all(kOp, y, stages, weights);
  if (y.numel() == 0) return out;
  check_flat(kOp, {&y, &out});
  const RkCombineArgs args{dtype_of(kOp, y),   all.count(),        all.data.data(),
                           all.weights.data(), y.const_data_ptr(), out.mutable_data_ptr()};
  const auto run = FR_FOR_ACTIVE_ISA(rk_combine_range);
  parallel_over(y.numel(), all.count() + 2, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

std::vector<Tensor> rk_combine_backward_cpu(const Tensor& grad, std::vector<double> given) {
  constexpr const char* kOp = "rk_combine_backward_cpu";
  std::vector<Tensor> outs;
  std::vector<void*> data;
  for (size_t i = 0; i < given.size(); ++i) {
    outs.push_back(torch::stable::empty_like(grad));
    data.push_back(outs.back().mutable_data_ptr());
    check_flat(kOp, {&grad, &outs.back()});
  }
  if (grad.numel() == 0) return outs;
  const std::vector<float> weights(given.begin(), given.end());
  const int64_t count = static_cast<int64_t>(given.size());
  const RkCombineBackwardArgs args{dtype_of(kOp, grad), count, data.data(), weights.data(), grad.const_data_ptr()};
  const auto run = FR_FOR_ACTIVE_ISA(rk_combine_backward_range);
  parallel_over(grad.numel(), count + 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return outs;
}

Tensor rk_error_cpu(const Tensor& y0, const Tensor& y1, std::vector<Tensor> stages, std::vector<double> weights,
                    double rtol, double atol) {
  constexpr const char* kOp = "rk_error_cpu";
  Tensor out = torch::stable::new_zeros(y0, {}, torch::headeronly::ScalarType::Float);
  check_matches(kOp, "y1", y1, y0);
  const Stages all(kOp, y0, stages, weights);
  if (y0.numel() == 0) return out;
  check_flat(kOp, {&y0, &y1});
  // The pieces do not depend on the number of threads, so neither does the sum.
  std::vector<double> partials((y0.numel() + kErrorPiece - 1) / kErrorPiece);
  const int64_t pieces = static_cast<int64_t>(partials.size());
  const double off = rounded_off(std::max(rtol, atol));
  const RkErrorArgs args{dtype_of(kOp, y0),
                         all.count(),
                         all.data.data(),
                         all.weights.data(),
                         y0.const_data_ptr(),
                         y1.const_data_ptr(),
                         static_cast<float>(rtol / off),
                         static_cast<float>(atol / off),
                         y0.numel(),
                         partials.data()};
  const auto run = FR_FOR_ACTIVE_ISA(rk_error_range);
  const int64_t work = kErrorPiece * (all.count() + 2);
  parallel_over(pieces, work, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  double total = 0;
  for (const double partial : partials) total += partial;
  *out.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total / static_cast<double>(y0.numel())) / off);
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("rk_combine_cpu", TORCH_BOX(&fusedres::rk_combine_cpu));
  m.impl("rk_combine_backward_cpu", TORCH_BOX(&fusedres::rk_combine_backward_cpu));
  m.impl("rk_error_cpu", TORCH_BOX(&fusedres::rk_error_cpu));
}
