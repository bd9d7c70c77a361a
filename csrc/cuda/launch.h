// Host-side helpers shared by the CUDA ops: the device of a call, errors, the shape of a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

// Lives in libtorch_cuda.so. Weak, so that one library loads in CPU builds of torch too, where it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// Raises what a call of the run time says, and takes it back: else the next call's check would find it again.
#define FR_CUDA_CHECK(call)                                                                        \
  do {                                                                                             \
    const cudaError_t status = (call);                                                             \
    if (status != cudaSuccess) (void)cudaGetLastError();                                           \
    STD_TORCH_CHECK(status == cudaSuccess, "fusedres: ", #call, ": ", cudaGetErrorString(status)); \
  } while (0)

// Registers kernels for CUDA tensors; in the emulator, whose device is the CPU, for CPU tensors.
#if defined(CUDA_EMULATOR)
#define FR_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m)
extern "C" void emu_forget_all();
extern "C" void emu_declare(const void* p, size_t bytes, int initialised);
#else
#define FR_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m)
#endif

namespace fusedres {

using torch::stable::Tensor;

// The device of a call, made current for as long as this lives, and its current stream. Kernels get their pointers
// here: the emulator then knows all memory that they may touch.
class Device {
 public:
#if defined(CUDA_EMULATOR)
  explicit Device(const Tensor&) { emu_forget_all(); }
#else
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fusedres: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  cudaStream_t stream() const { return stream_; }

  template <class T = void>
  const T* in(const Tensor& t) const {
    declare(t, true);
    return static_cast<const T*>(t.const_data_ptr());
  }
  template <class T = void>
  const T* in(const std::optional<Tensor>& t) const {
    return t ? in<T>(*t) : nullptr;
  }
  template <class T = void>
  T* out(Tensor& t) const {
    declare(t, false);
    return static_cast<T*>(t.mutable_data_ptr());
  }
  // Memory that is read and written.
  template <class T = void>
  T* both(Tensor& t) const {
    declare(t, true);
    return static_cast<T*>(t.mutable_data_ptr());
  }

 private:
#if defined(CUDA_EMULATOR)
  static void declare(const Tensor& t, bool initialised) {
    int64_t extent = t.numel() > 0 ? 1 : 0;
    for (int64_t d = 0; d < t.dim() && extent > 0; ++d) extent += (t.size(d) - 1) * t.stride(d);
    emu_declare(t.const_data_ptr(), extent * t.element_size(), initialised);
  }
#else
  static void declare(const Tensor&, bool) {}
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

inline int64_t processors() {
  int device = 0, count = 0;
  FR_CUDA_CHECK(cudaGetDevice(&device));
  FR_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned as_dim(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace fusedres
