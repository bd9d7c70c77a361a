// The tolerances of an error's norm in float32; see fusedres/ops/rk_combine.py.
#pragma once

#include <cmath>

namespace fusedres {

// What float32 makes a tolerance wrong by, as a factor. All errors are over their tolerances, so the result would be
// wrong by the larger one's: taken out of both, it is given back in the end.
inline double rounded_off(double tolerance) {
  const float rounded = static_cast<float>(tolerance);
  return rounded > 0 && std::isfinite(rounded) ? tolerance / rounded : 1;
}

}  // namespace fusedres
