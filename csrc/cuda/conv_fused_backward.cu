// The gradients of grouped convolutions between two norms, on CUDA; see fusedres/ops/conv_fused_backward.py for the
// formulas, conv_grouped.h for the kernel of dgrad and conv_wgrad.h for those of wgrad.
#include <torch/csrc/stable/library.h>

#include "cuda/conv_wgrad.h"

namespace fusedres {
namespace {

using torch::headeronly::ScalarType;

// ---------------------------------------------------------------------------------------------------------------------
// The rows of a norm's input gradient
// ---------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    bn_grad_rows_kernel(const Norm norm, const float* sums, float per_count, int64_t channels, float* out) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const float scale = norm.scale(channels, c);
  const float dbeta = sums == nullptr ? 0.f : sums[c], dgamma = sums == nullptr ? 0.f : sums[channels + c];
  out[c] = scale;
  out[channels + c] = scale * norm.rstd(channels, c) * (dgamma * per_count);
  out[2 * channels + c] = norm.mean(channels, c);
  out[3 * channels + c] = scale * (dbeta * per_count);
}

Tensor bn_grad_rows_cuda(const Tensor& norm, std::optional<Tensor> sums, double count) {
  constexpr const char* kOp = "bn_grad_rows_cuda";
  STD_TORCH_CHECK(norm.dim() == 2, kOp, ": norm must have 2 dimensions, got ", norm.dim());
  const int64_t channels = norm.size(1);
  check_rows(kOp, "norm", norm, channels);
  if (sums)
    STD_TORCH_CHECK(sums->dim() == 2 && sums->size(0) >= 2 && sums->size(1) == channels && sums->is_contiguous() &&
                        sums->scalar_type() == ScalarType::Float,
                    kOp, ": sums must be a contiguous float32 tensor of shape [2 or more, ", channels, "]");
  const Device device(norm);
  Tensor out = torch::stable::empty_like(norm);
  if (channels == 0) return out;
  const dim3 grid(as_dim(ceil_div(channels, kThreads)));
  const Norm rows{device.in<float>(norm)};
  bn_grad_rows_kernel<<<grid, dim3(kThreads), 0, device.stream()>>>(
      rows, device.in<float>(sums), static_cast<float>(1 / count), channels, device.out<float>(out));
  FR_CUDA_CHECK(cudaGetLastError());
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// dgrad
// ---------------------------------------------------------------------------------------------------------------------

// Behind dgrad: the addend, the activation's gradient at the pending input, and the sums of the norm before.
struct MaskEpilogue {
  Input addend, x;  // x: absent where nothing is pending
  Norm norm;
  int64_t act;
  float act_param;

  static constexpr int kStaged = 2;
  using Merge = SumTotals;

  template <class T>
  __device__ __forceinline__ void stage_operands(const EpilogueTile<T>& tile, int lane, int64_t pixel) const {
    if (addend.data != nullptr) stage_in(addend, tile.stage[0], lane, pixel, tile.first_output, tile.outputs);
    if (x.data != nullptr) stage_in(x, tile.stage[1], lane, pixel, tile.first_output, tile.outputs);
  }

  template <class Math, class T>
  __device__ __forceinline__ void finish(const EpilogueTile<T>& tile, int lane, const Sums& sums,
                                         Totals& totals) const {
    const int channels = tile.out_channels;
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      one_at_a_time();
      const int column = Math::column(lane, j), c = tile.first_output + column;
      if (column >= tile.outputs) continue;
      float value[kRows][2], at[kRows][2];
      load<Math>(tile.stage[0], addend.data != nullptr, tile, lane, column, value);
      load<Math>(tile.stage[1], x.data != nullptr, tile, lane, column, at);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) value[i][k] += sums[i][j + k];
#pragma unroll
      for (int k = 0; k < 2 && x.data != nullptr; ++k) {
        const float scale = norm.scale(channels, c + k), shift = norm.shift(channels, c + k);
        dispatch_activation(act, [&](auto functor) {
#pragma unroll
          for (int i = 0; i < kRows; ++i)
            value[i][k] = decltype(functor)::gradient(fmaf(scale, at[i][k], shift), value[i][k], act_param);
        });
      }
      round_to_stage<Math>(tile, lane, column, value);
      if (totals.numbers == nullptr) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float mean = norm.mean(channels, c + k), rstd = norm.rstd(channels, c + k);
        float sum = totals.a(j + k), product = totals.b(j + k);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (!tile.valid_row[i]) continue;
          sum += value[i][k];
          product = fmaf(value[i][k], (at[i][k] - mean) * rstd, product);
        }
        totals.a(j + k) = sum;
        totals.b(j + k) = product;
      }
    }
  }

  // Two neighbouring channels of a staged operand; zeros where it is absent.
  template <class Math, class T>
  static __device__ __forceinline__ void load(const T* stage, bool exists, const EpilogueTile<T>& tile, int lane,
                                              int column, float (&to)[kRows][2]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Pack<T, 2> pair{};
      if (exists && tile.valid_row[i]) pair = Pack<T, 2>::load(stage + Math::row(lane, i) * kStagePitch + column);
      to[i][0] = to_float(pair.lane[0]);
      to[i][1] = to_float(pair.lane[1]);
    }
  }
};

// What both gradients are given of the output's side.
OutputGradient output_gradient(const char* op, const Device& device, const Tensor& g, const std::optional<Tensor>& y,
                               const std::optional<Tensor>& grad_rows, const Tensor& x, const ConvShape& shape) {
  check_pixels(op, "g", g, x, shape.images, shape.filters, shape.out);
  check_rows(op, "grad_rows", grad_rows, shape.filters);
  if (!grad_rows) return {vector_input(op, "g", device, g), {nullptr, 0}, nullptr, shape.filters};
  STD_TORCH_CHECK(y.has_value(), op, ": y must be given with grad_rows");
  check_pixels(op, "y", *y, x, shape.images, shape.filters, shape.out);
  return {vector_input(op, "g", device, g), vector_input(op, "y", device, *y), device.in<float>(grad_rows),
          shape.filters};
}

std::tuple<Tensor, Tensor> conv_fused_dgrad_cuda(const Tensor& g, std::optional<Tensor> y,
                                                 std::optional<Tensor> grad_rows, const Tensor& weight, const Tensor& x,
                                                 std::optional<Tensor> norm, int64_t act, double act_param,
                                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                 std::vector<int64_t> dilation, std::optional<Tensor> addend,
                                                 std::optional<Tensor> into) {
  constexpr const char* kOp = "conv_fused_dgrad_cuda";
  const ConvShape shape = conv_shape(kOp, x, weight, stride, padding, dilation);
  const Grouping grouping = grouping_of(kOp, shape);
  check_rows(kOp, "norm", norm, shape.channels);
  check_activation(kOp, act);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.get_device_index() == x.get_device_index(), kOp,
                  ": weight must have the dtype and device of x");
  if (addend) check_pixels(kOp, "addend", *addend, x, shape.images, shape.channels, shape.in);
  if (into) check_pixels(kOp, "into", *into, x, shape.images, shape.channels, shape.in);
  const Device device(x);
  Tensor dx = into ? torch::stable::new_empty(x, {0})
                   : channels_last_tensor(x, shape.images, shape.channels, shape.in.h, shape.in.w);
  Tensor sums =
      norm ? torch::stable::new_zeros(x, {2, shape.channels}, ScalarType::Float) : torch::stable::new_empty(x, {0});
  if (shape.images == 0) return {dx, sums};
  Tensor& target = into ? *into : dx;
  const OutputGradient source = output_gradient(kOp, device, g, y, grad_rows, x, shape);
  const bool masks = norm.has_value() || act != Identity::kCode;
  const MaskEpilogue epilogue{vector_input(kOp, "addend", device, addend),
                              masks ? vector_input(kOp, "x", device, x) : Input{nullptr, 0},
                              {device.in<float>(norm)},
                              act,
                              static_cast<float>(act_param)};
  const Output out{device.out(target), vector_pitch(kOp, "into", target)};
  dispatch_conv(
      ConvCall<OutputGradient, MaskEpilogue>{kOp, device, x, weight, dgrad_plan(shape), true, grad_rows ? 2 : 1, source,
                                             epilogue, out, norm ? &sums : nullptr},
      grouping);
  return {dx, sums};
}

// ---------------------------------------------------------------------------------------------------------------------
// wgrad
// ---------------------------------------------------------------------------------------------------------------------

struct WgradCall {
  const char* op;
  const Device& device;
  const Tensor& like;
  ConvPlan plan;
  Pending input;
  OutputGradient gradient;
  WeightTarget target;
};

template <class Math>
void run_wgrad(const WgradCall& call) {
  constexpr int kElement = sizeof(typename Math::T);
  const Tiling tiling{kElement,
                      1,
                      call.gradient.plain() ? 1 : 2,
                      kChunkBytes + Math::kOffsets * static_cast<int64_t>(sizeof(int)),
                      512,
                      most_shared()};
  WgradArgs args{tiled(call.op, call.plan, tiling), call.input, call.gradient, nullptr, 0};
  const ConvPlan& plan = args.plan;
  const int64_t shared = std::max<int64_t>(shared_bytes(plan, tiling), Math::kReduced * sizeof(float));
  const int64_t across = int64_t{plan.blocks} * Math::slices(plan);
  const int64_t wanted = ceil_div(processors() * resident_blocks(conv_wgrad_kernel<Math>, shared), across);
  const int64_t splits = std::min<int64_t>({plan.all_tiles, wanted, 65535});
  args.length = int64_t{plan.out_channels} * plan.all_taps() * plan.group_in;
  Tensor partials = torch::stable::new_empty(call.like, {splits, args.length}, ScalarType::Float);
  args.partials = call.device.out<float>(partials);
  const dim3 grid(as_dim(across), as_dim(splits));
  conv_wgrad_kernel<Math><<<grid, dim3(kConvThreads), static_cast<size_t>(shared), call.device.stream()>>>(args);
  FR_CUDA_CHECK(cudaGetLastError());
  const dim3 slices(kWarpSize, as_dim(std::min<int64_t>(splits, kMergeSlices)));
  conv_wgrad_sum_kernel<<<dim3(as_dim(ceil_div(args.length, kWarpSize))), slices, 0, call.device.stream()>>>(
      args.partials, static_cast<int>(splits), args.length, plan.all_taps(), plan.group_in, call.target);
  FR_CUDA_CHECK(cudaGetLastError());
}

void dispatch_wgrad(const WgradCall& call, Grouping grouping) {
  const bool depthwise = grouping == Grouping::kDepthwise;
  switch (call.like.scalar_type()) {
    case ScalarType::Float:
      return depthwise ? run_wgrad<DepthWgrad<float>>(call) : run_wgrad<ScalarWgrad>(call);
    case ScalarType::Half:
      return depthwise ? run_wgrad<DepthWgrad<__half>>(call) : run_wgrad<MatrixWgrad<__half>>(call);
    case ScalarType::BFloat16:
      return depthwise ? run_wgrad<DepthWgrad<__nv_bfloat16>>(call) : run_wgrad<MatrixWgrad<__nv_bfloat16>>(call);
    default:
      STD_TORCH_CHECK(false, call.op, ": the dtype must be float32, bfloat16 or float16");
  }
}

void conv_fused_wgrad_cuda(const Tensor& g, std::optional<Tensor> y, std::optional<Tensor> grad_rows, const Tensor& x,
                           std::optional<Tensor> norm, int64_t act, double act_param, std::vector<int64_t> stride,
                           std::vector<int64_t> padding, std::vector<int64_t> dilation, Tensor out) {
  constexpr const char* kOp = "conv_fused_wgrad_cuda";
  const ConvShape shape = conv_shape(kOp, x, out, stride, padding, dilation);
  const Grouping grouping = grouping_of(kOp, shape);
  check_rows(kOp, "norm", norm, shape.channels);
  check_activation(kOp, act);
  STD_TORCH_CHECK(out.get_device_index() == x.get_device_index(), kOp, ": out must be on the device of x");
  if (shape.images == 0) {
    torch::stable::zero_(out);
    return;
  }
  const Device device(x);
  const Pending input{
      vector_input(kOp, "x", device, x), {device.in<float>(norm)}, shape.channels, act, static_cast<float>(act_param)};
  const WeightTarget target{floating_elements(kOp, "out", device, out),
                            {out.stride(0), out.stride(1), out.stride(2), out.stride(3)},
                            shape.kernel.w};
  dispatch_wgrad(
      {kOp, device, x, fprop_plan(shape), input, output_gradient(kOp, device, g, y, grad_rows, x, shape), target},
      grouping);
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) {
  m.impl("bn_grad_rows_cuda", TORCH_BOX(&fusedres::bn_grad_rows_cuda));
  m.impl("conv_fused_dgrad_cuda", TORCH_BOX(&fusedres::conv_fused_dgrad_cuda));
  m.impl("conv_fused_wgrad_cuda", TORCH_BOX(&fusedres::conv_fused_wgrad_cuda));
}
