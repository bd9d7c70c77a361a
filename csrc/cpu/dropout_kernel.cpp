#include "cpu/keep.h"
#include "cpu/philox.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

constexpr int64_t kWord = 64;  // bits of the result that are written at once

// Lane i: first + step * index(i).
template <class Index>
FR_INLINE Lanes sequence(uint64_t first, uint64_t step, Index index) {
  uint64_t lanes[Lanes::kWidth];
  for (int i = 0; i < Lanes::kWidth; ++i) lanes[i] = first + step * static_cast<uint64_t>(index(i));
  return load_lanes(lanes);
}

// Neighbouring elements from a whole word on: every word of every counter is used.
void bits_of_neighbours(const KeepArgs& a) {
  constexpr int kBits = 4 * Lanes::kWidth;
  const PhiloxKeys keys(a.seed);
  const Lanes counters = sequence(a.first / 4, 1, order);
  for (int64_t i = 0; i < a.count; i += kWord) {
    uint64_t word = 0;
    for (int bit = 0; bit < kWord; bit += kBits)
      word |= bits_in_order(philox(counter(counters + every((i + bit) / 4)), keys), a.threshold) << bit;
    a.bits[i / kWord] = word;
  }
}

void bits_of_distant(const KeepArgs& a) {
  const PhiloxKeys keys(a.seed);
  const Lanes indices = sequence(a.first, a.step, [](int lane) { return lane; });
  for (int64_t i = 0; i < a.count; i += kWord) {
    uint64_t word = 0;
    for (int bit = 0; bit < kWord; bit += Lanes::kWidth) {
      const Lanes index = indices + every(a.step * static_cast<uint64_t>(i + bit));
      word |= bits_at(philox(counter(shift_right<2>(index)), keys), index, a.threshold) << bit;
    }
    a.bits[i / kWord] = word;
  }
}

}  // namespace

void keep_bits(const KeepArgs& args) {
  if (args.step == 1 && args.first % kWord == 0)
    bits_of_neighbours(args);
  else
    bits_of_distant(args);
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
