// Plain types that the host code and the per-instruction-set kernels share; no code but what has internal linkage and
// is inlined by force, so nothing can be linked twice.
#pragma once

#include <cstdint>

namespace fusedres {

enum class DType : int { kFloat, kBFloat16, kHalf };

// What a join adds to its main operand.
enum class Residual : int { kNone, kPlain, kAffine };

// How a reduction cuts the values of a channel: into runs of `length` pixels (channels_last) or elements of a plane
// (contiguous), and each run into pieces. A partial result covers one piece; partials of one result are neighbours.
// Where every sample has a result of its own, a run never holds values of two samples.
struct Pieces {
  int64_t length;
  int64_t longest;
  int64_t per_run;
};

// Terms of a piece that are summed one by one; their sums are then added up. Many small terms in one sum would cost
// more digits than a piece that is a sample's whole result has to spare.
constexpr int64_t kRun = 16;

struct Piece {
  int64_t run;
  int64_t offset;  // of its first value in the run
  int64_t size;
};

namespace {
inline __attribute__((always_inline)) Piece piece_at(const Pieces& pieces, int64_t part) {
  const int64_t offset = part % pieces.per_run * pieces.longest, rest = pieces.length - offset;
  return {part / pieces.per_run, offset, rest < pieces.longest ? rest : pieces.longest};
}
}  // namespace

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
