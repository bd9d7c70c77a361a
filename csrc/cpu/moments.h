// The mean of a part of a channel's values, exact enough for Chan's merge.
#pragma once

#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// A mean is kept as a float m and what m lacks, e, and M2 = sum d^2 - n e^2 with d = x - m, so that a large mean costs
// a small variance nothing. The sums of narrower types are as good as exact in a float.
FR_INLINE void split_mean(const Wide& sum, int64_t n, Vec& mean, Vec& correction) {
  double lanes[Vec::kWidth];
  float high[Vec::kWidth], low[Vec::kWidth];
  store(lanes, sum);
  const double share = 1.0 / static_cast<double>(n);
  for (int i = 0; i < Vec::kWidth; ++i) {
    const double m = lanes[i] * share;
    high[i] = static_cast<float>(m);
    low[i] = static_cast<float>(m - high[i]);
  }
  mean = load(high);
  correction = load(low);
}

FR_INLINE void split_mean(Vec sum, int64_t n, Vec& mean, Vec& correction) {
  mean = sum * Vec(1.f / static_cast<float>(n));
  correction = Vec();
}

}  // namespace
}  // namespace FUSEDRES_ISA
}  // namespace fusedres
