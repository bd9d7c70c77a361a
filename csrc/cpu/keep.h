// Dropout's mask, as bits that are drawn before a kernel runs over the elements; see fusedres/ops/dropout.py.
#pragma once

#include "cpu/types.h"

namespace fusedres {

// Bit at + span * pitch + i belongs to element i of a span.
struct Keep {
  const uint8_t* bits;  // null: there is no dropout
  int64_t at;
  int64_t pitch;
  float scale;  // of what is kept
};

// Elements first, first + step, ..., as they are counted in NHWC order; neighbours from a multiple of 64 on cost least.
// Whole 64-bit words are written.
struct KeepArgs {
  uint64_t seed;
  uint32_t threshold;  // the least random word that keeps its element
  uint64_t first;
  uint64_t step;
  int64_t count;
  uint64_t* bits;
};

}  // namespace fusedres

FR_DECLARE_FOR_EACH_ISA(void keep_bits(const KeepArgs& args))
