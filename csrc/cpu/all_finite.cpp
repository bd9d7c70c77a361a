// Whether a tensor is free of NaN and infinity; see fusedres/ops/all_finite.py. One read of memory, so baseline
// instructions are wide enough.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/parallel.h"

namespace fusedres {
namespace {

// True where every exponent has a zero bit. Without an exit inside, so that the compiler can make it a vector loop.
template <class Bits>
bool exponents_are_finite(const Bits* x, int64_t n, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<Bits>((x[i] & exponent) == exponent);
  return found == 0;
}

bool range_is_finite(const void* x, DType dtype, int64_t begin, int64_t end) {
  if (dtype == DType::kFloat)
    return exponents_are_finite<uint32_t>(static_cast<const uint32_t*>(x) + begin, end - begin, 0x7f800000u);
  const uint16_t exponent = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
  return exponents_are_finite<uint16_t>(static_cast<const uint16_t*>(x) + begin, end - begin, exponent);
}

bool all_finite_cpu(const Tensor& x) {
  constexpr const char* kOp = "all_finite_cpu";
  constexpr int64_t kPiece = 1 << 15;  // values between two looks at what the others have found
  if (x.numel() == 0) return true;
  common_layout(kOp, {&x});
  const DType dtype = dtype_of(kOp, x);
  const void* data = x.const_data_ptr();
  std::atomic<bool> finite{true};
  parallel_over(x.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end && finite.load(std::memory_order_relaxed); at += kPiece)
      if (!range_is_finite(data, dtype, at, std::min(at + kPiece, end))) finite.store(false);
  });
  return finite.load();
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("all_finite_cpu", TORCH_BOX(&fusedres::all_finite_cpu)); }
