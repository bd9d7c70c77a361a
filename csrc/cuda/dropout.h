// Dropout's mask, recomputed element by element; see fusedres/ops/dropout.py for the formula.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>

#include "cuda/launch.h"

namespace fusedres {
namespace {

struct Dropout {
  bool active;
  uint64_t seed;
  const int64_t* seed_on_device;  // in its place, or null
  uint32_t threshold;             // the least random word that keeps its element
  float scale;                    // of what is kept
};

inline Dropout dropout_of(const char* op, const Device& device, double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, op, ": dropout must be in [0, 1], got ", p);
  if (p == 0) return {};
  STD_TORCH_CHECK(seed.has_value(), op, ": seed must be given where dropout is not 0");
  STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == torch::headeronly::ScalarType::Long, op,
                  ": seed must be an int64 tensor of one element");
  Dropout d{true, 0, nullptr, 0, 0.f};
  if (seed->device().type() == torch::headeronly::DeviceType::CPU)
    d.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  else
    d.seed_on_device = device.in<int64_t>(*seed);
  if (p == 1) return d;  // whatever is drawn, its scale is zero
  d.threshold = static_cast<uint32_t>(std::floor(p * 0x1p32));
  d.scale = static_cast<float>(1 / (1 - p));
  return d;
}

struct Words {
  uint32_t w[4];
};

// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3).
__device__ __forceinline__ Words philox(uint64_t seed, uint64_t counter) {
  uint32_t a0 = static_cast<uint32_t>(counter), a1 = static_cast<uint32_t>(counter >> 32), a2 = 0, a3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * a0, p1 = uint64_t{0xCD9E8D57u} * a2;
    a0 = static_cast<uint32_t>(p1 >> 32) ^ a1 ^ k0;
    a2 = static_cast<uint32_t>(p0 >> 32) ^ a3 ^ k1;
    a1 = static_cast<uint32_t>(p1);
    a3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a0, a1, a2, a3}};
}

// The scale of kWidth neighbours in memory, of which the first is element `first` in NHWC order and the next ones are
// `step` further each; zero where an element is dropped.
template <int kWidth>
__device__ __forceinline__ void keep_scales(const Dropout& d, uint64_t first, uint64_t step, float (&scales)[kWidth]) {
  const uint64_t seed = d.seed_on_device == nullptr ? d.seed : static_cast<uint64_t>(*d.seed_on_device);
  const auto scale_of = [&](uint32_t word) { return word >= d.threshold ? d.scale : 0.f; };
  if (kWidth % 4 == 0 && step == 1) {  // vectors begin at a multiple of their width
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      const Words words = philox(seed, first / 4 + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) scales[4 * i + k] = scale_of(words.w[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t element = first + i * step;
    const Words words = philox(seed, element / 4);
    const uint32_t low = element & 1 ? words.w[1] : words.w[0], high = element & 1 ? words.w[3] : words.w[2];
    scales[i] = scale_of(element & 2 ? high : low);
  }
}

}  // namespace
}  // namespace fusedres
