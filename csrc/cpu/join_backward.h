// Range kernels of the join's backward; see fusedres/ops/join_backward.py for the formulas.
#pragma once

#include "cpu/types.h"

namespace fusedres {

// Values of one channel that one partial sum covers at most.
constexpr int64_t kReduceRows = 128;    // channels_last: pixels
constexpr int64_t kReducePlane = 4096;  // contiguous: elements of a plane
constexpr int kReduceSums = 3;          // sum g, sum g (y - mean), sum g (r - res_mean)

// What both passes read: enough to recompute the activation's argument.
struct JoinBackwardArgs {
  DType dtype;
  Residual kind;
  int64_t act;
  float act_param;
  bool channels_last;
  int64_t channels;
  int64_t pixels;
  int64_t plane;
  int64_t inner;
  const void* grad;
  const void* y;
  const void* residual;
  const float *mean, *scale, *shift;
  const float *res_mean, *res_scale, *res_shift;
};

struct JoinReduceArgs : JoinBackwardArgs {
  int64_t parts;
  float* sums;  // [kReduceSums, parts, channels]
  void* emit;   // act(z), or null
};

struct JoinReduceMergeArgs {
  int64_t channels;
  int64_t parts;
  const float* sums;  // [kReduceSums, parts, channels]
  const float *rstd, *res_rstd;
  float* out;  // [kReduceSums, channels]: sum g, rstd sum g (y - mean), res_rstd sum g (r - res_mean)
};

// dy = scale g + slope (y - mean) + offset, and the same for the residual.
struct JoinApplyArgs : JoinBackwardArgs {
  bool training, res_training;  // whether the statistics are the batch's, and have a gradient
  const float *slope, *offset;
  const float *res_slope, *res_offset;
  void* grad_y;
  void* grad_residual;  // or null
};

}  // namespace fusedres

// Partials [begin, end) of all channels.
FR_DECLARE_FOR_EACH_ISA(void join_reduce_range(const JoinReduceArgs& args, int64_t begin, int64_t end))
// Channels [begin, end) of the merge.
FR_DECLARE_FOR_EACH_ISA(void join_reduce_merge_range(const JoinReduceMergeArgs& args, int64_t begin, int64_t end))
// Spans [begin, end).
FR_DECLARE_FOR_EACH_ISA(void join_apply_range(const JoinApplyArgs& args, int64_t begin, int64_t end))
