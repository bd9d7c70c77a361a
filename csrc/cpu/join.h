// Range kernels of the join; see fusedres/ops/join.py for the formula.
#pragma once

#include "cpu/types.h"

namespace fusedres {

struct JoinArgs {
  DType dtype;
  Residual kind;
  int64_t act;
  float act_param;
  bool per_lane;    // the affine varies along a span (channels_last) or is one value for it (contiguous)
  bool per_sample;  // scale and shift have a row for every sample
  int64_t inner;    // elements in a span
  int64_t channels;
  int64_t plane;
  const void* y;
  const void* residual;
  void* out;
  int64_t y_pitch, residual_pitch;  // from span to span
  const float *scale, *shift;
  const float *res_scale, *res_shift;
};

}  // namespace fusedres

FR_DECLARE_FOR_EACH_ISA(void join_range(const JoinArgs& args, int64_t begin, int64_t end))
