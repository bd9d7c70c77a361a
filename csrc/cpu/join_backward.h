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
  bool per_sample;  // scale and shift, and where there is one offset, have a row for every sample
  int64_t channels;
  int64_t plane;
  int64_t inner;
  const void* grad;
  const void* y;
  const void* residual;
  int64_t grad_pitch, y_pitch, residual_pitch;  // from span to span
  const float *mean, *scale, *shift;
  const float *res_mean, *res_scale, *res_shift;
};

struct JoinReduceArgs : JoinBackwardArgs {
  Pieces pieces;
  int64_t parts;
  float* sums;  // [kReduceSums, parts, channels]
  void* emit;   // the forward's result, or null
};

// Each group of `parts` neighbouring partials becomes one row of the result.
struct JoinReduceMergeArgs {
  int64_t channels;
  int64_t groups;
  int64_t parts;
  const float* sums;  // [kReduceSums, groups * parts, channels]
  const float *rstd, *res_rstd;
  double factor;  // of all sums
  float* out;     // [kReduceSums, groups, channels]: sum g, rstd sum g (y - mean), res_rstd sum g (r - res_mean)
};

// dy = scale g + slope (y - mean) + offset + addend, and for the residual the same without an addend.
struct JoinApplyArgs : JoinBackwardArgs {
  const float *slope, *offset;  // slope is null where the statistics are constants
  const float *res_slope, *res_offset;
  const void* addend;  // or null
  void* grad_y;
  void* grad_residual;  // or null
  int64_t addend_pitch, grad_y_pitch;
};

}  // namespace fusedres

// Partials [begin, end) of all channels.
FR_DECLARE_FOR_EACH_ISA(void join_reduce_range(const JoinReduceArgs& args, int64_t begin, int64_t end))
// Columns [begin, end) of the merge, of groups x channels.
FR_DECLARE_FOR_EACH_ISA(void join_reduce_merge_range(const JoinReduceMergeArgs& args, int64_t begin, int64_t end))
// Spans [begin, end).
FR_DECLARE_FOR_EACH_ISA(void join_apply_range(const JoinApplyArgs& args, int64_t begin, int64_t end))
