// Memory for one thread's work, aligned to cache lines and kept for its next call: fresh pages cost more than the work.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fusedres {

class Scratch {
 public:
  template <class T = void>
  T* reserve(const char* op, size_t bytes) {
    if (bytes > size_) {
      size_ = 0;  // should the memory not be there, the next call must not count on what was
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      STD_TORCH_CHECK(memory_ != nullptr, op, ": out of memory");
      size_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

}  // namespace fusedres
