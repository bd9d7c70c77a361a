// A hash of a few values of each tensor; see fusedres/ops/fingerprint.py. A few hundred loads: host code, one thread.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <vector>

#include "common/layout.h"

namespace fusedres {
namespace {

using torch::stable::Tensor;

constexpr int64_t kSamples = 16;
constexpr uint64_t kOffset = 14695981039346656037u, kPrime = 1099511628211u;  // FNV-1a

uint64_t bits_at(const char* data, int64_t i, size_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, data + i * size, size);  // little-endian, as every machine that torch runs on
  return bits;
}

int64_t fingerprint_cpu(std::vector<Tensor> tensors) {
  uint64_t hash = kOffset;
  for (const Tensor& t : tensors) {
    const bool dense = t.is_contiguous() || is_dense(t, Layout::kChannelsLast);
    const int64_t length = dense ? t.numel() : std::min<int64_t>(t.numel(), 1);
    const int64_t samples = std::min(length, kSamples);
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t at = samples == 1 ? 0 : i * (length - 1) / (samples - 1);
      hash = (hash ^ bits_at(data, at, t.element_size())) * kPrime;
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("fingerprint_cpu", TORCH_BOX(&fusedres::fingerprint_cpu)); }
