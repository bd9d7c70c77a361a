// The host's side of CUDA: errors, attributes, memory. "Device memory" is the host's.
#include "device.h"

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>

#include "machine_state.h"

namespace {

cudaError_t last_error = cudaSuccess;
std::string launch_failure;
std::map<const void*, size_t> shared_limits;

cudaError_t set(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Few, so that small inputs make threads walk their grid stride.
int processors = 2;
int l2_bytes = 50 << 20;
int launches_until_failure = -1;  // negative: none fails

}  // namespace

namespace emu {

void set_launch_failure(const std::string& message) {
  launch_failure = message;
  last_error = cudaErrorLaunchFailure;
}

size_t most_shared(const void* kernel) {
  return shared_limits.count(kernel) ? kDynamicSharedLimit : kStaticSharedLimit;
}

bool launch_is_valid(const Config& c, const void* kernel) {
  const auto refuse = [](cudaError_t error, const std::string& why) {
    launch_failure = why;
    last_error = error;
    return false;
  };
  if (launches_until_failure >= 0 && launches_until_failure-- == 0)
    return refuse(cudaErrorLaunchFailure, "launch: refused, as emu_fail asks for");
  const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
  const uint64_t blocks = uint64_t{c.grid.x} * c.grid.y * c.grid.z;
  if (threads == 0 || blocks == 0) return refuse(cudaErrorInvalidConfiguration, "launch: an empty grid or block");
  if (threads > kThreadsPerBlock || c.block.z > 64)
    return refuse(cudaErrorInvalidConfiguration, "launch: a block has at most 1024 threads, 64 of them in z");
  if (c.grid.y > 65535 || c.grid.z > 65535 || c.grid.x > 0x7fffffffu)
    return refuse(cudaErrorInvalidConfiguration, "launch: a grid has at most 2^31-1, 65535 and 65535 blocks");
  const size_t allowed = shared_limits.count(kernel) ? shared_limits[kernel] : kStaticSharedLimit;
  if (c.dynamic_shared > allowed)
    return refuse(cudaErrorInvalidValue, "launch: " + std::to_string(c.dynamic_shared) +
                                             " bytes of dynamic shared memory, " + std::to_string(allowed) +
                                             " are allowed (cudaFuncSetAttribute raises that to 227 KiB)");
  if (!c.cooperative) return true;
  if (blocks > kBlocksTogether)
    return refuse(cudaErrorCooperativeLaunchTooLarge,
                  "launch: " + std::to_string(blocks) + " cooperative blocks; the emulator runs at most 128 together");
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, static_cast<int>(threads), c.dynamic_shared);
  if (blocks > uint64_t(resident) * uint64_t(processors))
    return refuse(cudaErrorCooperativeLaunchTooLarge, "launch: " + std::to_string(blocks) +
                                                          " cooperative blocks, but only " +
                                                          std::to_string(resident * processors) + " run at once");
  return true;
}

}  // namespace emu

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device";
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchFailure:
    case cudaErrorCooperativeLaunchTooLarge:
      return launch_failure.empty() ? "invalid argument" : launch_failure.c_str();
  }
  return "unknown error";
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (posix_memalign(p, 256, bytes) != 0) return set(cudaErrorMemoryAllocation);
  memset(*p, 0xff, bytes);
  if (emu::kChecks) emu::machine().checker.declare(*p, bytes, false);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (emu::kChecks) emu::machine().checker.forget(p);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  memset(p, value, bytes);
  if (emu::kChecks) emu::machine().checker.initialise(p, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  memcpy(to, from, bytes);
  if (emu::kChecks && kind != cudaMemcpyDeviceToHost) emu::machine().checker.initialise(to, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : set(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return last_error; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return last_error; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = processors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = emu::kThreadsPerProcessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = emu::kStaticSharedLimit;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emu::kDynamicSharedLimit;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = l2_bytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
  }
  return set(cudaErrorInvalidValue);
}

}  // extern "C"

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > emu::kDynamicSharedLimit) return set(cudaErrorInvalidValue);
  shared_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

// Registers are not known here, so this is an upper bound.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared) {
  const unsigned by_threads = emu::kThreadsPerProcessor / static_cast<unsigned>((threads + 31) / 32 * 32);
  const unsigned by_shared = static_cast<unsigned>(emu::kSharedPerProcessor / (shared + emu::kSharedReserved));
  *blocks = static_cast<int>(std::min({by_threads, by_shared, emu::kBlocksPerProcessor}));
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a test sets and asks
// ---------------------------------------------------------------------------------------------------------------------

#pragma GCC visibility push(default)
extern "C" {

void emu_seed(uint64_t seed) { emu::machine().random.seed(seed); }
void emu_copies(int mode) { emu::machine().copies = static_cast<emu::Copies>(mode); }
void emu_processors(int count) { processors = count; }
void emu_l2_bytes(int bytes) { l2_bytes = bytes; }
void emu_fail(int after) { launches_until_failure = after; }
uint64_t emu_launches() { return emu::machine().launches; }
void emu_count_traffic(int on) { emu::machine().checker.counting = on != 0; }
void emu_declare(const void* p, size_t bytes, int initialised) {
  if (emu::kChecks) emu::machine().checker.declare(p, bytes, initialised != 0);
}
void emu_forget_all() { emu::machine().checker.forget_all(); }
void emu_clear_traffic() { emu::machine().checker.clear_traffic(); }
const char* emu_traffic() {
  static std::string text;
  text = emu::machine().checker.report();
  return text.c_str();
}

__attribute__((constructor)) static void read_environment() {
  const auto number = [](const char* name, long absent) {
    const char* text = getenv(name);
    return text != nullptr && *text != '\0' ? strtol(text, nullptr, 10) : absent;
  };
  emu_seed(static_cast<uint64_t>(number("EMU_SEED", 1)));
  emu_copies(static_cast<int>(number("EMU_COPIES", 0)));
  emu_processors(static_cast<int>(number("EMU_PROCESSORS", processors)));
  emu_l2_bytes(static_cast<int>(number("EMU_L2_BYTES", l2_bytes)));
}

}  // extern "C"
#pragma GCC visibility pop
