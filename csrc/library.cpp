// What the library says about itself. Operators have their schemas in fusedres/ops/<op>.py, so that an install without
// this library keeps them all; each kernel registers itself in its own file, csrc/<backend>/<op>. Only these queries,
// which mean nothing without the library, have their schemas here.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "common/isa.h"

namespace fusedres {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string build_info() {
  return std::string("compiler=") + kCompiler + "|cuda_archs=" FUSEDRES_CUDA_ARCHS "|torch_target=2.10";
}

std::string cpu_isa() { return isa_name(active_isa()); }

std::vector<std::string> cpu_isas() { return available_isas(); }

// For every convolution: a string that crosses torch's stable interface is never freed there.
bool cpu_has_vectors() { return active_isa() != Isa::kScalar; }

void set_cpu_isa(std::string name) { set_isa(name); }

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");
  m.def("cpu_has_vectors() -> bool");
  m.def("set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fusedres::build_info));
  m.impl("cpu_isa", TORCH_BOX(&fusedres::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&fusedres::cpu_isas));
  m.impl("cpu_has_vectors", TORCH_BOX(&fusedres::cpu_has_vectors));
  m.impl("set_cpu_isa", TORCH_BOX(&fusedres::set_cpu_isa));
}
