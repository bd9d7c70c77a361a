// What ops that treat every element alike ask of their operands: one shape, one dtype, one dense layout, so that the
// tensors can be walked as flat memory.
#pragma once

#include <initializer_list>

#include "common/layout.h"

namespace fusedres {

// Four-dimensional tensors may all be channels_last instead of all contiguous. Null pointers are absent tensors.
inline void check_flat(const char* op, std::initializer_list<const torch::stable::Tensor*> tensors) {
  bool contiguous = true;
  for (const auto* t : tensors) contiguous = contiguous && (t == nullptr || t->is_contiguous());
  STD_TORCH_CHECK(contiguous || all_dense(tensors, Layout::kChannelsLast), op,
                  ": the tensors must all be contiguous, or all be dense in channels_last");
}

}  // namespace fusedres
