#include "cpu/dispatch.h"
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
void bits_of_neighbours(const KeepBitsArgs& a) {
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

void bits_of_distant(const KeepBitsArgs& a) {
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

template <class T>
void multiply(const KeepArgs& a) {
  const Keep keep = a.keep;
  const Vec scale(keep.scale);
  const bool dense = a.from_pitch == a.inner && a.to_pitch == a.inner && keep.pitch == a.inner;  // then one long span
  const int64_t spans = dense ? 1 : a.spans, inner = dense ? a.spans * a.inner : a.inner;
  for (int64_t span = 0; span < spans; ++span) {
    const T* from = static_cast<const T*>(a.from) + span * a.from_pitch;
    T* to = static_cast<T*>(a.to) + span * a.to_pitch;
    const int64_t at = keep.at + span * keep.pitch;
    // Multiplied, not selected: zero times NaN or infinity is what it is in stock PyTorch.
    for_each_vector(inner, [&](int64_t i, auto extent) {
      store(to + i, load(from + i, extent) * where_bits(keep.bits, at + i, scale), extent);
    });
  }
}

}  // namespace

void keep_bits(const KeepBitsArgs& args) {
  if (args.step == 1 && args.first % kWord == 0)
    bits_of_neighbours(args);
  else
    bits_of_distant(args);
}

void keep_spans(const KeepArgs& args) {
  dispatch_dtype(args.dtype, [&](auto element) { multiply<decltype(element)>(args); });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
