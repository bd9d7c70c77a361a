// Host side of the Winograd convolutions: geometry, transformed weights, blocks, threads.
#pragma once

#include <vector>

#include "cpu/parallel.h"
#include "cpu/winograd.h"

namespace fusedres {

// Weights [K, C, 3, 3] of any strides, transformed; `rotated` gives those of the data gradient, [C, K, 3, 3] with the
// taps turned around. The memory is the calling thread's, until its next call.
class WinogradWeights {
 public:
  WinogradWeights(const char* op, const Tensor& weight, bool rotated);
  const float* packed() const { return packed_; }
  bool taps() const { return taps_; }

  // Elements of the transformed weights of so many filters.
  static int64_t size(int64_t filters, int64_t channels);
  // Says whether all of them are finite; those that are not are of use as taps only.
  static bool pack(const char* op, const Tensor& weight, bool rotated, bool taps, float* packed);

 private:
  const float* packed_;
  bool taps_;
};

// The float32 tensor as pixels; throws where it is neither channels_last nor a slice of a channels_last tensor.
Pixels pixels_of(const char* op, const char* name, const Tensor& t);

// Sets sizes and tiles from the source, its result's channels and the padding around it.
void set_geometry(WinogradArgs& args, const char* op, const Tensor& source, int64_t filters, int64_t pad_h,
                  int64_t pad_w);

void set_bias(WinogradArgs& args, const char* op, const std::optional<Tensor>& bias);

// Where the result goes, of a source with the samples of x: `into`, or a new tensor. Returns which.
Tensor set_output(WinogradArgs& args, const char* op, const Tensor& x, const std::optional<Tensor>& into);

// Runs all tiles. Where statistics are wanted, `stats` is [2, K]; where sums are, `sums` is [2, K] and the second row
// is multiplied by `rstd`.
void run_winograd(const char* op, WinogradArgs args, float* stats, float* sums, const float* rstd);

// Computes a weight gradient, and says whether all of it is finite: where it is not, NaN may have spread to weights
// that did not read one.
bool run_winograd_wgrad(const char* op, const WinogradWgradArgs& args);

// An uninitialised float32 tensor [n, c, h, w] in channels_last.
Tensor new_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);

// Throws where this is no convolution with 3x3 taps of step one.
void check_winograd(const char* op, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

}  // namespace fusedres
