#include "cpu/conv_wgrad_tiles.h"

namespace fusedres {
namespace FUSEDRES_ISA {

void wgrad_task(const WgradArgs& args, const WgradTask& task) {
  dispatch_dtype(args.dtype, [&](auto element) { run_wgrad<FloatArithmetic, decltype(element)>(args, task); });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
