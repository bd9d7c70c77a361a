// Range kernels of the batch statistics; see fusedres/ops/bn_stats.py for the formula.
#pragma once

#include "cpu/types.h"

namespace fusedres {

// Values of one channel that one partial covers at most: small enough to be read twice from a core's own cache.
constexpr int64_t kStatsRows = 128;   // channels_last: pixels
constexpr int64_t kStatsPlane = 512;  // contiguous: elements of a plane, few enough to be summed in a float

// Statistics of the pieces, [parts, channels] each: the mean is mean + correction.
struct StatsPartials {
  float* mean;
  float* correction;
  float* m2;
};

struct StatsArgs {
  DType dtype;
  bool channels_last;
  int64_t channels;
  Pieces pieces;
  const void* x;
  int64_t x_pitch;  // between pixels
  void* into;       // x is copied there, or null
  int64_t into_pitch;
  StatsPartials partials;
};

// Each group of `parts` neighbouring partials becomes one row of the result.
struct StatsMergeArgs {
  int64_t channels;
  int64_t groups;
  int64_t parts;
  const double* counts;  // [parts]
  StatsPartials partials;
  float* out;  // [2, groups, channels]: mean, M2
};

}  // namespace fusedres

// Partials [begin, end) of all channels.
FR_DECLARE_FOR_EACH_ISA(void stats_range(const StatsArgs& args, int64_t begin, int64_t end))
// Columns [begin, end) of the merge, of groups x channels.
FR_DECLARE_FOR_EACH_ISA(void stats_merge_range(const StatsMergeArgs& args, int64_t begin, int64_t end))
