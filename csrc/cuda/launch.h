// Host-side helpers shared by the CUDA ops: the current stream, errors, grid sizes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// Lives in libtorch_cuda.so. Weak, so that one library loads in CPU builds of torch too, where it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#define FR_CUDA_CHECK(call)                                                                        \
  do {                                                                                             \
    const cudaError_t status = (call);                                                             \
    STD_TORCH_CHECK(status == cudaSuccess, "fusedres: ", #call, ": ", cudaGetErrorString(status)); \
  } while (0)

namespace fusedres {

inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fusedres: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks of `threads` that the current device holds at once: more would only load their parameters again.
inline int64_t resident_blocks(int threads) {
  constexpr int kThreadsPerProcessor = 2048;
  int device = 0, processors = 0;
  FR_CUDA_CHECK(cudaGetDevice(&device));
  FR_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return int64_t{processors} * (kThreadsPerProcessor / threads);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fusedres
