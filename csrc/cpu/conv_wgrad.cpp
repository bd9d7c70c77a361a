#include "cpu/conv_wgrad.h"

#include <torch/csrc/stable/library.h>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

// Pixels that a block holds at least: enough to make reading and writing the sums cheap, few enough to stay in cache.
constexpr int64_t kBlockPixels = 224;
// Pictures up to this size are one block.
constexpr int64_t kSinglePixels = 512;
// Pixels in a row of a picture whose pixels do not see each other.
constexpr int64_t kFlatWidth = 128;

// Filters of a task below which packing x once more for it costs more than even tasks bring.
constexpr int64_t kFewestFilters = 64;

void set_geometry(WgradArgs& a, const Tensor& x, const Tensor& grad, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  a.channels = x.size(1);
  a.filters = grad.size(1);
  a.stride_h = stride[0], a.stride_w = stride[1];
  a.pad_h = padding[0], a.pad_w = padding[1];
  a.dilation_h = dilation[0], a.dilation_w = dilation[1];
  const bool pointwise =
      a.kernel_h == 1 && a.kernel_w == 1 && a.stride_h == 1 && a.stride_w == 1 && a.pad_h == 0 && a.pad_w == 0;
  if (pointwise) {  // no pixel sees another: one flat picture of long rows
    const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
    a.width = a.out_width = divide_up(divide_up(pixels, divide_up(pixels, kFlatWidth)), 2) * 2;
    a.height = a.out_height = a.rows = divide_up(pixels, a.width);
    a.last_width = pixels - (a.rows - 1) * a.width;
  } else {
    a.height = x.size(2), a.width = x.size(3);
    a.out_height = grad.size(2), a.out_width = a.last_width = grad.size(3);
    a.rows = grad.size(0) * a.out_height;
  }
  const bool small = a.rows * a.out_width <= kSinglePixels;
  a.block_rows = std::min(small ? a.rows : divide_up(kBlockPixels, a.out_width), kMaxBlockRows);
}

// Splits filters x channels into tasks whose sums fit a core's cache, and into enough of them for all threads.
std::pair<int64_t, int64_t> task_extent(const WgradArgs& a) {
  const int64_t taps = a.kernel_h * a.kernel_w;
  int64_t k = taps == 1 ? 256 : 128, c = taps == 1 ? 256 : 64;
  k = std::min(k, divide_up(a.filters, kTileK) * kTileK);
  c = std::min(c, divide_up(a.channels, kTileC) * kTileC);
  const int64_t threads = torch::stable::get_num_threads();
  while (divide_up(a.filters, k) * divide_up(a.channels, c) < threads && (k > kTileK || c > kTileC)) {
    if (k >= 2 * c || c == kTileC)
      k = divide_up(k / 2, kTileK) * kTileK;
    else
      c = divide_up(c / 2, kTileC) * kTileC;
  }
  // Tasks of one size, as many for each thread: a small rest would leave a thread waiting.
  int64_t k_tasks = divide_up(a.filters, k);
  const int64_t c_tasks = divide_up(a.channels, c), even = divide_up(k_tasks, threads) * threads;
  if (k_tasks * c_tasks % threads != 0 && a.filters / even >= kFewestFilters) k_tasks = even;
  return {divide_up(divide_up(a.filters, k_tasks), kTileK) * kTileK,
          divide_up(divide_up(a.channels, c_tasks), kTileC) * kTileC};
}

void set_output(WgradArgs& a, Tensor& out, const char* op) {
  a.out_dtype = dtype_of(op, out);
  a.out = out.mutable_data_ptr();
  const auto strides = out.strides();
  a.out_stride_k = strides[0], a.out_stride_c = strides[1];
  a.out_stride_h = strides[2], a.out_stride_w = strides[3];
}

void run_tasks(const WgradArgs& a) {
  const auto [k_step, c_step] = task_extent(a);
  const int64_t k_tasks = divide_up(a.filters, k_step), c_tasks = divide_up(a.channels, c_step);
  const bool dot = a.dtype == DType::kBFloat16 && active_isa() == Isa::kAvx512Bf16;
#ifdef FUSEDRES_NO_X86
  const auto run = FR_FOR_ACTIVE_ISA(wgrad_task);
#else
  const auto run = dot ? &avx512bf16::wgrad_task : FR_FOR_ACTIVE_ISA(wgrad_task);
#endif
  const WgradRoom room = wgrad_room(a, k_step, c_step);
  const size_t element = dot ? 2 : 4;
  torch::stable::parallel_for(0, k_tasks * c_tasks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch x, grad, sums;
    void* x_panels = x.reserve("conv_wgrad_cpu", room.x_panels * element);
    void* grad_panels = grad.reserve("conv_wgrad_cpu", room.grad_panels * element);
    auto* task_sums = sums.reserve<float>("conv_wgrad_cpu", room.sums * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / c_tasks * k_step, c = i % c_tasks * c_step;
      const int64_t k_end = std::min(k + k_step, a.filters), c_end = std::min(c + c_step, a.channels);
      run(a, WgradTask{k, k_end, c, c_end, x_panels, grad_panels, task_sums});
    }
  });
}

// Filters, channels and tiles from which on minimal filtering is ahead.
constexpr int64_t kFewestOfWinograd = 32;

// Computes the gradient by minimal filtering where that suits, and says whether it has.
bool run_winograd(const char* op, const WgradArgs& a, const Tensor& x) {
  const bool suits = a.dtype == DType::kFloat && a.out_dtype == DType::kFloat && a.kernel_h == 3 && a.kernel_w == 3 &&
                     a.stride_h == 1 && a.stride_w == 1 && a.dilation_h == 1 && a.dilation_w == 1;
  if (!suits || std::min(a.filters, a.channels) < kFewestOfWinograd) return false;
  WinogradWgradArgs w{};
  set_geometry(w.conv, op, x, a.filters, a.pad_h, a.pad_w);
  if (w.conv.tiles < kFewestOfWinograd) return false;
  w.conv.source = a.pending ? WinogradSource::kPending : WinogradSource::kPlain;
  w.conv.act = a.act;
  w.conv.act_param = a.act_param;
  w.conv.scale = a.scale, w.conv.shift = a.shift;
  w.conv.x = {static_cast<const float*>(a.x), a.channels};
  w.grad = {static_cast<const float*>(a.grad), a.filters};
  w.out = static_cast<float*>(a.out);
  w.out_stride_k = a.out_stride_k, w.out_stride_c = a.out_stride_c;
  w.out_stride_h = a.out_stride_h, w.out_stride_w = a.out_stride_w;
  return run_winograd_wgrad(op, w);
}

// The kernel walks the operands by these sizes, so they are checked to the last.
void check_convolution(const char* op, const Tensor& grad, const Tensor& x, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const Tensor& out) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation must have two values each");
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == grad.size(1) && out.size(1) == x.size(1), op, ": out must be [",
                  grad.size(1), ", ", x.size(1), ", R, S]");
  STD_TORCH_CHECK(x.size(0) == grad.size(0) && x.numel() > 0 && grad.numel() > 0, op,
                  ": grad and x must hold the same number of samples, and at least one");
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = x.size(d + 2) + 2 * padding[d] - dilation[d] * (out.size(d + 2) - 1) - 1;
    STD_TORCH_CHECK(stride[d] > 0 && dilation[d] > 0 && reach >= 0 && grad.size(d + 2) == reach / stride[d] + 1, op,
                    ": grad does not have the size of this convolution's output in dimension ", d + 2);
  }
}

void conv_wgrad_cpu(const Tensor& grad, const Tensor& x, std::optional<Tensor> norm, int64_t act, double act_param,
                    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    Tensor out) {
  constexpr const char* kOp = "conv_wgrad_cpu";
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && grad.scalar_type() == x.scalar_type(), kOp,
                  ": grad and x must be 4-d and have one dtype");
  STD_TORCH_CHECK(is_dense(x, Layout::kChannelsLast) && is_dense(grad, Layout::kChannelsLast), kOp,
                  ": grad and x must be dense in channels_last");
  check_convolution(kOp, grad, x, stride, padding, dilation, out);
  check_activation(kOp, act);
  const NormRows rows(kOp, "norm", norm, x);
  WgradArgs args{};
  args.dtype = dtype_of(kOp, x);
  args.pending = norm.has_value() || act != 0;
  args.act = act;
  args.act_param = static_cast<float>(act_param);
  args.scale = rows.scale();
  args.shift = rows.shift();
  args.x = x.const_data_ptr();
  args.grad = grad.const_data_ptr();
  args.kernel_h = out.size(2), args.kernel_w = out.size(3);
  set_geometry(args, x, grad, stride, padding, dilation);
  set_output(args, out, kOp);
  if (!run_winograd(kOp, args, x)) run_tasks(args);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("conv_wgrad_cpu", TORCH_BOX(&fusedres::conv_wgrad_cpu)); }
