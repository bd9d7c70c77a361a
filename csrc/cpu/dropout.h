// The dropout of a call, and the masks of the elements that a kernel is about to run over; see fusedres/ops/dropout.py.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/keep.h"
#include "cpu/parallel.h"

namespace fusedres {

class Dropout {
 public:
  Dropout(const char* op, double p, const std::optional<Tensor>& seed) {
    STD_TORCH_CHECK(p >= 0 && p <= 1, op, ": dropout must be in [0, 1], got ", p);
    if (p == 0) return;
    STD_TORCH_CHECK(seed.has_value(), op, ": seed must be given where dropout is not 0");
    STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == torch::headeronly::ScalarType::Long &&
                        seed->device().type() == torch::headeronly::DeviceType::CPU,
                    op, ": seed must be an int64 tensor of one element on the CPU");
    active_ = true;
    seed_ = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    if (p == 1) return;  // whatever is drawn, its scale is zero
    threshold_ = static_cast<uint32_t>(std::floor(p * 0x1p32));
    scale_ = static_cast<float>(1 / (1 - p));
  }

  bool active() const { return active_; }

  // The mask of elements [first, first + size) of the spans [begin, end), counted from `first`, in `room`.
  Keep mask(const Spans& spans, int64_t begin, int64_t end, int64_t first, int64_t size,
            std::vector<uint64_t>& room) const {
    const auto draw = FR_FOR_ACTIVE_ISA(keep_bits);
    const int64_t channels = spans.channels;
    if (spans.layout == Layout::kChannelsLast) {  // neighbouring spans are neighbouring elements, from a whole word on
      const int64_t from = (begin * channels + first) / 64 * 64, count = (end - 1) * channels + first + size - from;
      room.resize(words_for(count) + 1);  // a vector of bits is read as a whole 32-bit word
      draw({seed_, threshold_, static_cast<uint64_t>(from), 1, count, room.data()});
      return {reinterpret_cast<const uint8_t*>(room.data()), first - from, channels, scale_};
    }
    const int64_t words = words_for(size);
    room.resize((end - begin) * words + 1);
    for (int64_t span = begin; span < end; ++span) {
      const int64_t sample = span / channels, channel = span % channels;
      const auto from = static_cast<uint64_t>((sample * spans.plane + first) * channels + channel);
      draw({seed_, threshold_, from, static_cast<uint64_t>(channels), size, room.data() + (span - begin) * words});
    }
    return {reinterpret_cast<const uint8_t*>(room.data()), -begin * words * 64, words * 64, scale_};
  }

 private:
  static int64_t words_for(int64_t bits) { return (bits + 63) / 64; }

  bool active_ = false;
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;
  float scale_ = 0.f;
};

// Elements whose mask is drawn at once: few enough to stay in the nearest cache.
constexpr int64_t kMaskBlock = 1 << 15;

// Calls run(args, begin, end) over the spans [begin, end), in blocks with their masks where there is a dropout.
template <class Args, class Run>
void run_with_masks(const Dropout& dropout, const Spans& spans, const Args& args, Run run, int64_t begin, int64_t end) {
  if (!dropout.active()) return run(args, begin, end);
  const int64_t step = std::max<int64_t>(1, kMaskBlock / spans.inner);
  std::vector<uint64_t> room;
  Args block = args;
  for (int64_t at = begin; at < end; at += step) {
    const int64_t stop = std::min(end, at + step);
    block.keep = dropout.mask(spans, at, stop, 0, spans.inner, room);
    run(block, at, stop);
  }
}

}  // namespace fusedres
