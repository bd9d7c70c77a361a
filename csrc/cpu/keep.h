// Range kernels of dropout: the mask as bits, and its product with a tensor; see fusedres/ops/dropout.py.
#pragma once

#include "cpu/types.h"

namespace fusedres {

// Elements first, first + step, ..., as they are counted in NHWC order; neighbours from a multiple of 64 on cost least.
// Whole 64-bit words are written.
struct KeepBitsArgs {
  uint64_t seed;
  uint32_t threshold;  // the least random word that keeps its element
  uint64_t first;
  uint64_t step;
  int64_t count;
  uint64_t* bits;
};

// The mask of some spans: bit at + span * pitch + i belongs to element i of a span.
struct Keep {
  const uint8_t* bits;
  int64_t at;
  int64_t pitch;
  float scale;  // of what is kept
};

// to = from * mask over spans of `inner` elements; `to` may be `from`.
struct KeepArgs {
  DType dtype;
  int64_t spans, inner;
  const void* from;
  void* to;
  int64_t from_pitch, to_pitch;  // from span to span
  Keep keep;
};

}  // namespace fusedres

FR_DECLARE_FOR_EACH_ISA(void keep_bits(const KeepBitsArgs& args))
FR_DECLARE_FOR_EACH_ISA(void keep_spans(const KeepArgs& args))
