// The dropout of a call; see fusedres/ops/dropout.py.
//
// Kernels know nothing of it. They run over blocks that fit a core's own cache, and the gradient that a block reads, or
// the result that it has written, is multiplied by the block's mask there. Each product is rounded, as in stock
// PyTorch.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/keep.h"
#include "cpu/parallel.h"

namespace fusedres {

// Elements [first, first + size) of the spans [begin, end).
struct Block {
  int64_t begin, end;
  int64_t first, size;
};

// One thread's memory for a block.
struct BlockRoom {
  std::vector<uint64_t> bits;
  std::vector<float> gradient;
};

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }
inline void* element_at(void* base, DType dtype, int64_t i) { return static_cast<char*>(base) + i * bytes_of(dtype); }
inline const void* element_at(const void* base, DType dtype, int64_t i) {
  return static_cast<const char*>(base) + i * bytes_of(dtype);
}

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
    scale_ = 1 / (1 - p);
  }

  bool active() const { return active_; }
  double scale() const { return scale_; }  // of what is kept

  // The mask of a block, whose first span counts as span 0 and first element as element 0.
  Keep draw(const Spans& spans, const Block& block, std::vector<uint64_t>& room) const {
    const auto run = FR_FOR_ACTIVE_ISA(keep_bits);
    const int64_t channels = spans.channels;
    if (spans.layout == Layout::kChannelsLast) {  // neighbouring spans are neighbouring elements, from a whole word on
      const int64_t first = block.begin * channels + block.first, from = first / 64 * 64;
      const int64_t count = first + (block.end - block.begin - 1) * channels + block.size - from;
      room.resize(words_for(count) + 1);  // a vector's bits are read as a whole 32-bit word
      run({seed_, threshold_, static_cast<uint64_t>(from), 1, count, room.data()});
      return {reinterpret_cast<const uint8_t*>(room.data()), first - from, channels, static_cast<float>(scale_)};
    }
    const int64_t words = words_for(block.size);
    room.resize((block.end - block.begin) * words + 1);
    for (int64_t span = block.begin; span < block.end; ++span) {
      const int64_t sample = span / channels, channel = span % channels;
      const auto from = static_cast<uint64_t>((sample * spans.plane + block.first) * channels + channel);
      uint64_t* bits = room.data() + (span - block.begin) * words;
      run({seed_, threshold_, from, static_cast<uint64_t>(channels), block.size, bits});
    }
    return {reinterpret_cast<const uint8_t*>(room.data()), 0, words * 64, static_cast<float>(scale_)};
  }

  // Multiplies a block of a tensor that begins at `base` by its mask.
  static void multiply(const Keep& keep, const Block& block, DType dtype, void* base, int64_t pitch) {
    void* t = element_at(base, dtype, block.begin * pitch + block.first);
    const auto run = FR_FOR_ACTIVE_ISA(keep_spans);
    run({dtype, block.end - block.begin, block.size, t, t, pitch, pitch, keep});
  }

  // Gives a kernel's arguments the block's masked gradient in the place of the gradient.
  template <class Args>
  static void mask_gradient(const Keep& keep, const Block& block, Args& args, std::vector<float>& room) {
    const int64_t spans = block.end - block.begin;
    room.resize(spans * block.size);
    const void* from = element_at(args.grad, args.dtype, block.begin * args.grad_pitch + block.first);
    const auto run = FR_FOR_ACTIVE_ISA(keep_spans);
    run({args.dtype, spans, block.size, from, room.data(), args.grad_pitch, block.size, keep});
    args.grad = element_at(room.data(), args.dtype, -(block.begin * block.size + block.first));
    args.grad_pitch = block.size;
  }

 private:
  static int64_t words_for(int64_t bits) { return (bits + 63) / 64; }

  bool active_ = false;
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;
  double scale_ = 0;
};

// Calls run(block) for the spans [begin, end), in blocks that stay in the nearest cache.
template <class Run>
void for_each_block(const Spans& spans, int64_t begin, int64_t end, Run run) {
  constexpr int64_t kElements = 1 << 12;
  const int64_t step = std::max<int64_t>(1, kElements / spans.inner);
  for (int64_t at = begin; at < end; at += step) run(Block{at, std::min(end, at + step), 0, spans.inner});
}

}  // namespace fusedres
