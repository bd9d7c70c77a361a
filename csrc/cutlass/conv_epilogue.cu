// Forward convolutions on Hopper's tensor cores through CUTLASS, with scale, bias, residual and ReLU in the epilogue;
// see fusedres/ops/conv_epilogue.py. An implicit GEMM: rows are output pixels, columns output channels.

// clang-format off: CUTLASS's headers take what those before them bring
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>
#include <cutlass/kernel_hardware_info.h>
#include <cutlass/conv/convolution.h>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/thread/activation.h>
// clang-format on

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/checks.h"
#include "common/layout.h"
#include "cuda/launch.h"

namespace fusedres {
namespace {

using cute::_1;
using cute::_128;
using cute::_64;

// A tile of output pixels and channels: the accumulators of one warp group.
template <class Pixels, class Channels>
using Tile = cute::Shape<Pixels, Channels, cute::Shape<_64>>;
using Small = Tile<_64, _64>;
using Tall = Tile<_128, _64>;
using Large = Tile<_128, _128>;
constexpr int64_t kTiles = 3;

template <class T, class Tile>
struct Convolution {
  using Element = T;
  using Layout = cutlass::layout::TensorNHWC;
  static constexpr int kAligned = 8;  // elements in the 16 bytes that TMA wants
  using Cluster = cute::Shape<_1, _1, _1>;
  using Fusion = cutlass::epilogue::fusion::PerColLinCombPerColBiasEltAct<cutlass::epilogue::thread::ReLu, T, float,
                                                                          float, T, float>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, T, Layout, kAligned, T, Layout, kAligned,
      cutlass::epilogue::TmaWarpSpecialized, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, T, Layout, kAligned, T,
      Layout, kAligned, float, Tile, Cluster,
      cutlass::conv::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Problem =
      cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, Mainloop::DispatchPolicy::NumSpatialDimensions>;
  using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;
  using Device = cutlass::conv::device::ConvUniversalAdapter<Kernel>;
};

struct Operands {
  const Tensor &x, &weight;
  const float *scale, *bias;
  const void* residual;  // or null
  Tensor& out;
  std::vector<int64_t> stride, padding, dilation;
};

#define FR_CUTLASS_CHECK(call)                                                                   \
  do {                                                                                           \
    const cutlass::Status status = (call);                                                       \
    STD_TORCH_CHECK(status == cutlass::Status::kSuccess, "conv_epilogue_cutlass: ", #call, ": ", \
                    cutlass::cutlassGetStatusString(status));                                    \
  } while (0)

template <class C>
void run(const Device& device, const Operands& t) {
  using T = typename C::Element;
  const auto size = [](const Tensor& tensor, int d) { return static_cast<int>(tensor.size(d)); };
  const auto pair = [](const std::vector<int64_t>& v) {
    return cute::array<int, 2>{static_cast<int>(v[0]), static_cast<int>(v[1])};
  };
  const typename C::Problem problem(cutlass::conv::Mode::kCrossCorrelation,
                                    {size(t.x, 0), size(t.x, 2), size(t.x, 3), size(t.x, 1)},
                                    {size(t.weight, 0), size(t.weight, 2), size(t.weight, 3), size(t.weight, 1)},
                                    pair(t.padding), pair(t.padding), pair(t.stride), pair(t.dilation), 1);
  typename C::Kernel::StrideC residual_stride;
  typename C::Kernel::StrideD out_stride;
  cute::for_each(cute::make_seq<cute::rank<0>(typename C::Kernel::StrideC{})>{}, [&](auto i) {
    cute::get<0, i>(residual_stride) = problem.stride_C[C::Problem::RankT - 2 - i];
    cute::get<0, i>(out_stride) = problem.stride_C[C::Problem::RankT - 2 - i];
  });
  T* out = device.out<T>(t.out);
  // Without a residual nothing is read there, but TMA wants an address.
  const T* residual = t.residual == nullptr ? out : static_cast<const T*>(t.residual);
  typename C::Device::Arguments arguments{
      problem, {device.in<T>(t.x), device.in<T>(t.weight)}, {{}, residual, residual_stride, out, out_stride}};
  arguments.epilogue.thread.alpha_ptr = t.scale;
  arguments.epilogue.thread.bias_ptr = t.bias;
  arguments.epilogue.thread.beta = t.residual == nullptr ? 0.f : 1.f;
  typename C::Device convolution;
  FR_CUTLASS_CHECK(convolution.can_implement(arguments));
  const auto bytes = static_cast<int64_t>(C::Device::get_workspace_size(arguments));
  Tensor workspace = torch::stable::new_empty(t.x, {bytes}, torch::headeronly::ScalarType::Byte);
  FR_CUTLASS_CHECK(convolution.initialize(arguments, bytes ? device.out(workspace) : nullptr, device.stream()));
  FR_CUTLASS_CHECK(convolution.run(device.stream()));
}

// The largest tile that the channels fill, as long as the tiles fill the GPU.
int64_t choose_tile(int64_t pixels, int64_t channels) {
  const auto tiles = [&](int64_t height, int64_t width) {
    return ceil_div(pixels, height) * ceil_div(channels, width);
  };
  if (channels >= 128 && tiles(128, 128) >= processors()) return 2;
  return tiles(128, 64) >= processors() ? 1 : 0;
}

template <class T>
void run_tile(const Device& device, const Operands& t, int64_t tile) {
  switch (tile) {
    case 0:
      return run<Convolution<T, Small>>(device, t);
    case 1:
      return run<Convolution<T, Tall>>(device, t);
    default:
      return run<Convolution<T, Large>>(device, t);
  }
}

int64_t output_size(int64_t input, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
  return (input + 2 * padding - dilation * (filter - 1) - 1) / stride + 1;
}

Tensor conv_epilogue_cutlass(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
                             std::optional<Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                             std::vector<int64_t> dilation, int64_t tile) {
  using torch::headeronly::ScalarType;
  constexpr const char* kOp = "conv_epilogue_cutlass";
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1), kOp,
                  ": x must be [N, C, H, W] and weight [K, C, R, S]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), kOp, ": weight must have the dtype of x");
  const int64_t channels = weight.size(0);
  STD_TORCH_CHECK(x.size(1) % 8 == 0 && channels % 8 == 0, kOp, ": channels must be multiples of 8, got ", x.size(1),
                  " and ", channels);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, kOp,
                  ": stride, padding and dilation must be pairs");
  for (const auto& [name, t] : {std::pair{"scale", &scale}, std::pair{"bias", &bias}})
    STD_TORCH_CHECK(
        t->dim() == 1 && t->size(0) == channels && t->is_contiguous() && t->scalar_type() == ScalarType::Float, kOp,
        ": ", name, " must be a contiguous float32 tensor of ", channels, " values");
  STD_TORCH_CHECK(-1 <= tile && tile < kTiles, kOp, ": tile must be from -1 (any) to ", kTiles - 1, ", got ", tile);
  const Device device(x);
  const auto size = [&](int d) {
    return output_size(x.size(2 + d), weight.size(2 + d), stride[d], padding[d], dilation[d]);
  };
  Tensor flat = torch::stable::new_empty(x, {x.size(0), size(0), size(1), channels});
  Tensor out = torch::stable::transpose(torch::stable::transpose(flat, 1, 3), 2, 3);  // NHWC in memory
  if (residual) check_matches(kOp, "residual", *residual, out);
  STD_TORCH_CHECK(all_dense({&x, &weight, pointer_to(residual)}, Layout::kChannelsLast), kOp,
                  ": x, weight and residual must be dense in channels_last");
  if (out.numel() == 0) return out;
  const Operands given{
      x, weight, device.in<float>(scale), device.in<float>(bias), device.in(residual), out, stride, padding, dilation};
  if (tile < 0) tile = choose_tile(out.numel() / channels, channels);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      run_tile<cutlass::bfloat16_t>(device, given, tile);
      break;
    case ScalarType::Half:
      run_tile<cutlass::half_t>(device, given, tile);
      break;
    default:
      STD_TORCH_CHECK(false, kOp, ": the dtype must be bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("conv_epilogue_cutlass", TORCH_BOX(&fusedres::conv_epilogue_cutlass)); }
