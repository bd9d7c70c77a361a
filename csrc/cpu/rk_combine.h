// Range kernels of the Runge-Kutta updates; see fusedres/ops/rk_combine.py for the formulas.
#pragma once

#include "cpu/types.h"

namespace fusedres {

constexpr int64_t kErrorPiece = 4096;  // elements that one partial sum of the error covers at most

// out = y + sum_i weights[i] stages[i]
struct RkCombineArgs {
  DType dtype;
  int64_t count;
  const void* const* stages;
  const float* weights;
  const void* y;
  void* out;
};

// outs[i] = weights[i] grad
struct RkCombineBackwardArgs {
  DType dtype;
  int64_t count;
  void* const* outs;
  const float* weights;
  const void* grad;
};

// Partial sums of the squares of sum_i weights[i] stages[i] / (atol + rtol max(|y0|, |y1|)).
struct RkErrorArgs {
  DType dtype;
  int64_t count;
  const void* const* stages;
  const float* weights;
  const void *y0, *y1;
  float rtol, atol;
  int64_t numel;
  double* partials;
};

}  // namespace fusedres

// Elements [begin, end).
FR_DECLARE_FOR_EACH_ISA(void rk_combine_range(const RkCombineArgs& args, int64_t begin, int64_t end))
FR_DECLARE_FOR_EACH_ISA(void rk_combine_backward_range(const RkCombineBackwardArgs& args, int64_t begin, int64_t end))
// Partials [begin, end).
FR_DECLARE_FOR_EACH_ISA(void rk_error_range(const RkErrorArgs& args, int64_t begin, int64_t end))
