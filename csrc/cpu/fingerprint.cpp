// A hash of some values of each tensor; see fusedres/ops/fingerprint.py. Thousands of loads: host code, one thread.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace fusedres {
namespace {

using torch::stable::Tensor;

constexpr int kLanes = 4;  // so that no step waits for the one before
constexpr uint64_t kOffset = 14695981039346656037u, kPrime = 1099511628211u;  // FNV-1a

constexpr int64_t kAhead = 64;  // a multiple of the lanes; every value of a weight is in a page of its own

// Steps along the wrapped diagonal of a tensor, in bytes from its first value.
class Diagonal {
 public:
  explicit Diagonal(const Tensor& t) {
    for (int64_t d = 0; d < t.dim(); ++d) {
      const int64_t size = t.size(d), stride = t.stride(d) * static_cast<int64_t>(t.element_size());
      count_ = std::max(count_, size);
      if (size > 1) dims_.push_back({size, stride, 0});
    }
  }

  int64_t count() const { return count_; }

  int64_t next() {
    const int64_t here = offset_;
    for (Dim& dim : dims_) {
      offset_ += dim.stride;
      if (++dim.at == dim.size) {
        dim.at = 0;
        offset_ -= dim.size * dim.stride;
      }
    }
    return here;
  }

 private:
  struct Dim {
    int64_t size, stride, at;
  };
  std::vector<Dim> dims_;
  int64_t count_ = 1, offset_ = 0;
};

template <typename Bits>
void hash_diagonal(const Tensor& t, uint64_t (&lanes)[kLanes]) {
  Diagonal diagonal(t);
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  const char* ahead[kAhead];
  for (int64_t done = 0; done < diagonal.count(); done += kAhead) {
    const int64_t block = std::min(diagonal.count() - done, kAhead);
    for (int64_t i = 0; i < block; ++i) {
      ahead[i] = data + diagonal.next();
      __builtin_prefetch(ahead[i]);
    }
    for (int64_t i = 0; i < block; ++i) {
      Bits bits;
      std::memcpy(&bits, ahead[i], sizeof(bits));
      lanes[i % kLanes] = (lanes[i % kLanes] ^ bits) * kPrime;
    }
  }
}

void hash(const Tensor& t, uint64_t (&lanes)[kLanes]) {
  if (t.numel() == 0) return;
  switch (t.element_size()) {
    case 1:
      return hash_diagonal<uint8_t>(t, lanes);
    case 2:
      return hash_diagonal<uint16_t>(t, lanes);
    case 4:
      return hash_diagonal<uint32_t>(t, lanes);
    case 8:
      return hash_diagonal<uint64_t>(t, lanes);
    default:
      STD_TORCH_CHECK(false, "fusedres::fingerprint: tensors must have values of 1, 2, 4 or 8 bytes, got ",
                      t.element_size());
  }
}

int64_t fingerprint_cpu(std::vector<Tensor> tensors) {
  uint64_t lanes[kLanes] = {kOffset, kOffset, kOffset, kOffset};
  for (const Tensor& t : tensors) hash(t, lanes);
  uint64_t value = kOffset;
  for (const uint64_t lane : lanes) value = (value ^ lane) * kPrime;
  return static_cast<int64_t>(value);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("fingerprint_cpu", TORCH_BOX(&fusedres::fingerprint_cpu)); }
