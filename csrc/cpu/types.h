// Plain types that the host code and the per-instruction-set kernels share; no code, so nothing can be linked twice.
#pragma once

#include <cstdint>

namespace fusedres {

enum class DType : int { kFloat, kBFloat16, kHalf };

// What a join adds to its main operand.
enum class Residual : int { kNone, kPlain, kAffine };

}  // namespace fusedres

// Declares a range kernel for every instruction set that it is compiled for.
#define FR_DECLARE_FOR_EACH_ISA(declaration) \
  namespace fusedres {                       \
  namespace scalar {                         \
  declaration;                               \
  }                                          \
  namespace avx2 {                           \
  declaration;                               \
  }                                          \
  namespace avx512 {                         \
  declaration;                               \
  }                                          \
  }
