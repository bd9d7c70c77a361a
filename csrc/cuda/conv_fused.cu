// Grouped convolutions with what surrounds them, on CUDA; see fusedres/ops/conv_fused.py for the formulas and
// conv_grouped.h for the kernel.
#include <torch/csrc/stable/library.h>

#include "cuda/conv_grouped.h"

namespace fusedres {
namespace {

using torch::headeronly::ScalarType;

// In the dtype of the convolution, or in float; or absent.
struct Bias {
  const void* data;
  bool wide;

  template <class T>
  __device__ __forceinline__ float get(int channel) const {
    if (data == nullptr) return 0.f;
    return wide ? static_cast<const float*>(data)[channel] : to_float(static_cast<const T*>(data)[channel]);
  }
};

// Behind the convolution: bias, affine, residual with an affine of its own, activation; then the statistics of what is
// written.
struct JoinEpilogue {
  Bias bias;
  Norm norm;
  Input residual;
  Norm res_norm;
  int64_t act;
  float act_param;

  static constexpr int kStaged = 1;
  using Merge = MomentTotals;

  template <class T>
  __device__ __forceinline__ void stage_operands(const EpilogueTile<T>& tile, int lane, int64_t pixel) const {
    if (residual.data != nullptr) stage_in(residual, tile.stage[0], lane, pixel, tile.first_output, tile.outputs);
  }

  template <class Math, class T>
  __device__ __forceinline__ void finish(const EpilogueTile<T>& tile, int lane, const Sums& sums,
                                         Totals& totals) const {
    const float count = tile.count();
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      one_at_a_time();
      const int column = Math::column(lane, j);
      if (column >= tile.outputs || count == 0) continue;
      float value[kRows][2];
      join<Math>(tile, lane, column, j, sums, value);
#pragma unroll
      for (int k = 0; k < 2 && act != Identity::kCode; ++k)
        dispatch_activation(act, [&](auto functor) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) value[i][k] = decltype(functor)::forward(value[i][k], act_param);
        });
      round_to_stage<Math>(tile, lane, column, value);
      if (totals.numbers == nullptr) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        one_at_a_time();
        add_moments(tile, j + k, k, value, count, totals);
      }
    }
    totals.count += count;
  }

  // scale (sum + bias) + shift + the residual, for two neighbouring channels.
  template <class Math, class T>
  __device__ __forceinline__ void join(const EpilogueTile<T>& tile, int lane, int column, int j, const Sums& sums,
                                       float (&value)[kRows][2]) const {
    const int channels = tile.out_channels, c = tile.first_output + column;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float term = bias.get<T>(c + k);
      const float scale = norm.scale(channels, c + k), shift = norm.shift(channels, c + k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) value[i][k] = fmaf(scale, sums[i][j + k] + term, shift);
    }
    if (residual.data == nullptr) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!tile.valid_row[i]) continue;
      const auto side = Pack<T, 2>::load(tile.stage[0] + Math::row(lane, i) * kStagePitch + column);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        value[i][k] += fmaf(res_norm.scale(channels, c + k), to_float(side.lane[k]), res_norm.shift(channels, c + k));
    }
  }

  // Mean and M2 of the lane's rows of a channel, merged into those of its earlier ones.
  template <class T>
  static __device__ __forceinline__ void add_moments(const EpilogueTile<T>& tile, int j, int k,
                                                     const float (&value)[kRows][2], float count,
                                                     const Totals& totals) {
    float origin = totals.origin(j), mean = 0, m2 = 0;
    if (totals.count == 0) {
#pragma unroll
      for (int i = kRows - 1; i >= 0; --i)
        if (tile.valid_row[i]) origin = value[i][k];
      totals.origin(j) = origin = isfinite(origin) ? origin : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) mean += tile.valid_row[i] ? value[i][k] - origin : 0.f;
    mean /= count;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float d = tile.valid_row[i] ? value[i][k] - origin - mean : 0.f;
      m2 = fmaf(d, d, m2);
    }
    Merge::merge(totals.a(j), totals.b(j), totals.count, mean, m2, count);
  }
};

struct Prologue {
  const Tensor& x;
  const std::optional<Tensor>& norm;
  int64_t act;
  double act_param;
};

// The call that both ops make; the epilogue's operands are the join's.
struct Given {
  Prologue prologue;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const std::vector<int64_t>&stride, &padding, &dilation;
  std::optional<Tensor>& into;
  std::optional<Tensor> out_norm = {}, residual = {}, res_norm = {};
  int64_t out_act = 0;
  double out_act_param = 0;
};

// The result, or an empty tensor where it went to `into`; with `stats`, its statistics are written there.
Tensor run(const char* op, Given& given, Tensor* stats) {
  const Tensor& x = given.prologue.x;
  const ConvShape shape = conv_shape(op, x, given.weight, given.stride, given.padding, given.dilation);
  const Grouping grouping = grouping_of(op, shape);
  STD_TORCH_CHECK(
      given.weight.scalar_type() == x.scalar_type() && given.weight.get_device_index() == x.get_device_index(), op,
      ": weight must have the dtype and device of x");
  check_rows(op, "norm", given.prologue.norm, shape.channels);
  check_rows(op, "out_norm", given.out_norm, shape.filters);
  check_rows(op, "res_norm", given.res_norm, shape.filters);
  check_activation(op, given.prologue.act);
  check_activation(op, given.out_act);
  if (given.bias)
    STD_TORCH_CHECK(
        given.bias->dim() == 1 && given.bias->size(0) == shape.filters && given.bias->is_contiguous() &&
            (given.bias->scalar_type() == ScalarType::Float || given.bias->scalar_type() == x.scalar_type()),
        op, ": bias must be contiguous, of shape [", shape.filters, "], in float32 or the dtype of x");
  if (given.residual) check_pixels(op, "residual", *given.residual, x, shape.images, shape.filters, shape.out);
  if (given.into) check_pixels(op, "into", *given.into, x, shape.images, shape.filters, shape.out);
  const Device device(x);
  Tensor y = given.into ? torch::stable::new_empty(x, {0})
                        : channels_last_tensor(x, shape.images, shape.filters, shape.out.h, shape.out.w);
  if (shape.images == 0) return y;
  Tensor& target = given.into ? *given.into : y;
  const Pending source{vector_input(op, "x", device, x),
                       {device.in<float>(given.prologue.norm)},
                       shape.channels,
                       given.prologue.act,
                       static_cast<float>(given.prologue.act_param)};
  const JoinEpilogue epilogue{{device.in(given.bias), given.bias && given.bias->scalar_type() == ScalarType::Float},
                              {device.in<float>(given.out_norm)},
                              vector_input(op, "residual", device, given.residual),
                              {device.in<float>(given.res_norm)},
                              given.out_act,
                              static_cast<float>(given.out_act_param)};
  const Output out{device.out(target), vector_pitch(op, "into", target)};
  dispatch_conv(ConvCall<Pending, JoinEpilogue>{op, device, x, given.weight, fprop_plan(shape), false, 1, source,
                                                epilogue, out, stats},
                grouping);
  return y;
}

std::tuple<Tensor, Tensor> conv_fused_fprop_cuda(const Tensor& x, std::optional<Tensor> norm, int64_t act,
                                                 double act_param, const Tensor& weight, std::optional<Tensor> bias,
                                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                 std::vector<int64_t> dilation, bool want_stats,
                                                 std::optional<Tensor> into) {
  Given given{{x, norm, act, act_param}, weight, bias, stride, padding, dilation, into};
  STD_TORCH_CHECK(weight.dim() == 4, "conv_fused_fprop_cuda: weight must have 4 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(!want_stats || x.size(0) > 0, "conv_fused_fprop_cuda: x holds no element to take statistics of");
  Tensor stats = want_stats ? torch::stable::new_empty(x, {2, weight.size(0)}, ScalarType::Float)
                            : torch::stable::new_empty(x, {0});
  Tensor y = run("conv_fused_fprop_cuda", given, want_stats ? &stats : nullptr);
  return {y, stats};
}

Tensor conv_fused_join_cuda(const Tensor& x, std::optional<Tensor> norm, int64_t act, double act_param,
                            const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                            std::vector<int64_t> padding, std::vector<int64_t> dilation, std::optional<Tensor> out_norm,
                            std::optional<Tensor> residual, std::optional<Tensor> res_norm, int64_t out_act,
                            double out_act_param, std::optional<Tensor> into) {
  Given given{
      {x, norm, act, act_param},          weight,  bias,         stride, padding, dilation, into, out_norm, residual,
      residual ? res_norm : std::nullopt, out_act, out_act_param};
  return run("conv_fused_join_cuda", given, nullptr);
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("conv_fused_fprop_cuda", TORCH_BOX(&fusedres::conv_fused_fprop_cuda));
  m.impl("conv_fused_join_cuda", TORCH_BOX(&fusedres::conv_fused_join_cuda));
}
