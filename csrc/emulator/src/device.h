// The device that the machine pretends to be, and the last error.
#pragma once

#include <string>

#include "emulator/machine.h"

namespace emu {

// Of compute capability 9.0: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr size_t kStaticSharedLimit = 48 << 10;
constexpr size_t kThreadsPerBlock = 1024;
constexpr size_t kBlocksTogether = 128;  // the emulator's own limit, of cooperative launches
constexpr size_t kDynamicSharedLimit = 227 << 10;
constexpr size_t kSharedPerProcessor = 228 << 10;
constexpr size_t kSharedReserved = 1 << 10;  // per block
constexpr unsigned kThreadsPerProcessor = 2048;
constexpr unsigned kBlocksPerProcessor = 32;

// Whether a GPU would take this launch; sets the error where not.
// Static and dynamic together: what every kernel may have, or all that there is where it has asked for more.
size_t most_shared(const void* kernel);
bool launch_is_valid(const Config& config, const void* kernel);
void set_launch_failure(const std::string& message);

}  // namespace emu
