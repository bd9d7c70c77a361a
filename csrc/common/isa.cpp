#include "common/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>

namespace fusedres {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};

// __builtin_cpu_supports asks the operating system too: a CPU whose wide registers it does not save says no.
Isa detect() {
#if !defined(FUSEDRES_NO_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::kScalar;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kScalar;
#endif
}

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa checked(const std::string& name, const char* where) {
  const std::vector<std::string> names = available_isas();
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<Isa>(i);
  STD_TORCH_CHECK(false, where, ": this machine has no instruction set '", name, "'; it has ", joined(names));
}

Isa initial_isa() {
  const char* name = std::getenv("FUSEDRES_ISA");
  return name != nullptr && *name != '\0' ? checked(name, "FUSEDRES_ISA") : detected_isa();
}

// Function-local, so that a wrong FUSEDRES_ISA raises in the first call of a kernel and not while the library loads.
std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa active_isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { current().store(checked(name, "set_cpu_isa"), std::memory_order_relaxed); }

std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> available_isas() { return {kNames, kNames + static_cast<int>(detected_isa()) + 1}; }

}  // namespace fusedres
