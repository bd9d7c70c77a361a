// Range kernels of the gated join and its backward; see fusedres/ops/gated_join.py for the formulas.
#pragma once

#include "cpu/types.h"

namespace fusedres {

// What decides the gate: the sigmoid itself, or whether it exceeds a threshold.
struct Gating {
  bool sparse;
  float threshold;
};

struct GatedJoinArgs {
  DType dtype;
  Gating gating;
  const void *f, *logits, *x;
  void* out;
};

// A gradient whose pointer is null is not wanted; f and x are read for that of the logits alone.
struct GatedJoinBackwardArgs {
  DType dtype;
  Gating gating;
  const void *grad, *logits, *f, *x;
  void *grad_f, *grad_logits, *grad_x;
};

}  // namespace fusedres

// Elements [begin, end).
FR_DECLARE_FOR_EACH_ISA(void gated_join_range(const GatedJoinArgs& args, int64_t begin, int64_t end))
FR_DECLARE_FOR_EACH_ISA(void gated_join_backward_range(const GatedJoinBackwardArgs& args, int64_t begin, int64_t end))
