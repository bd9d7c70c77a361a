// Run-time dispatch between the instruction sets that the CPU kernels are compiled for.
#pragma once

#include <string>
#include <vector>

namespace fusedres {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };  // each includes those before it

// What the kernels use now: the best that this machine has, unless FUSEDRES_ISA or set_isa lowered it.
Isa active_isa();

// Throws where the name is unknown or where this machine, or this build, lacks the instruction set.
void set_isa(const std::string& name);

std::string isa_name(Isa isa);

// The names that set_isa takes on this machine, narrowest first.
std::vector<std::string> available_isas();

}  // namespace fusedres
