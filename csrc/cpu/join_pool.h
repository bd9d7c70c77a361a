// Range kernels of max pooling and its backward; see fusedres/ops/join_pool.py.
//
// A unit is what is pooled apart from all else: a sample, whose pixels have the channels beside each other
// (channels_last), or a plane (contiguous), as if it had one channel.
#pragma once

#include "cpu/types.h"

namespace fusedres {

struct PoolShape {
  int64_t kernel[2], stride[2], padding[2];
  int64_t size[2];    // of the image
  int64_t pooled[2];  // of the result
};

// Rows of the result of one unit.
struct JoinPoolArgs {
  DType dtype;
  bool channels_last;
  PoolShape shape;
  int64_t channels;
  const void* value;  // of the unit's first pixel, of which rows may be missing that no window reads
  int64_t pitch;      // from pixel to pixel of `value`
  void* out;
  uint8_t* taken;  // or null
};

// Rows of the gradient of one unit's image.
struct JoinPoolBackwardArgs {
  DType dtype;
  bool channels_last;
  PoolShape shape;
  int64_t channels;
  const void* grad;
  const uint8_t* taken;
  void* out;
  float* sums;  // contiguous: room for the rows
};

}  // namespace fusedres

FR_DECLARE_FOR_EACH_ISA(void join_pool_rows(const JoinPoolArgs& args, int64_t begin, int64_t end))
FR_DECLARE_FOR_EACH_ISA(void join_pool_backward_rows(const JoinPoolBackwardArgs& args, int64_t begin, int64_t end))
