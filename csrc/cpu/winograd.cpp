#include <atomic>

#include "cpu/scratch.h"
#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of a block: few, so that what a block makes stays in a core's cache, but the more the larger the weights, which
// are read once for each. A function of the shape alone, so that partial results have one order.
int64_t tiles_of_block(int64_t filters, int64_t channels) {
  constexpr int64_t kOwnCache = int64_t{1} << 20;  // bytes
  const int64_t weights = kPoints * filters * channels * static_cast<int64_t>(sizeof(float));
  return weights < 2 * kOwnCache ? 42 : weights < 8 * kOwnCache ? 56 : 128;
}

// Blocks of nearly one size, an even number of them where there are several.
int64_t block_count(const WinogradArgs& a) {
  const int64_t blocks = divide_up(a.tiles, tiles_of_block(a.filters, a.channels));
  return blocks > 1 ? divide_up(blocks, 2) * 2 : 1;
}

// Parts that the filters are divided into, so that there is work for every thread. No result depends on it.
int64_t filter_parts(const WinogradArgs& a) {
  const int64_t threads = torch::stable::get_num_threads(), panels = divide_up(a.filters, kPanel);
  return std::min(panels, divide_up(threads, a.blocks));
}

int64_t first_tile(const WinogradArgs& a, int64_t block) { return a.tiles * block / a.blocks; }

// How many results each block holds.
std::vector<double> counts_of(const WinogradArgs& a) {
  std::vector<double> counts(a.blocks);
  for (int64_t block = 0; block < a.blocks; ++block) {
    int64_t count = 0;
    for (int64_t tile = first_tile(a, block); tile < first_tile(a, block + 1); ++tile) {
      const int64_t column = tile % a.tile_columns * 2, row = tile / a.tile_columns % a.tile_rows * 2;
      count += (a.out_height - row > 1 ? 2 : 1) * (a.out_width - column > 1 ? 2 : 1);
    }
    counts[block] = static_cast<double>(count);
  }
  return counts;
}

void run_tasks(const char* op, const WinogradArgs& a) {
  const int64_t parts = filter_parts(a), panels = divide_up(a.filters, kPanel);
  const int64_t tiles = a.taps ? 0 : divide_up(a.tiles, a.blocks), filters = divide_up(panels, parts) * kPanel;
  const auto bytes = [&](int64_t channels) { return kPoints * tiles * winograd_pitch(channels) * sizeof(float); };
  const auto run = FR_FOR_ACTIVE_ISA(winograd_task);
  torch::stable::parallel_for(0, a.blocks * parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch window, products;
    auto* windows = window.reserve<float>(op, bytes(a.channels));
    auto* sums = products.reserve<float>(op, bytes(filters));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / parts, part = i % parts, first = first_tile(a, block);
      const int64_t k_begin = panels * part / parts * kPanel;
      const int64_t k_end = std::min(panels * (part + 1) / parts * kPanel, a.filters);
      run(a, WinogradTask{block, first, first_tile(a, block + 1) - first, k_begin, k_end, windows, sums});
    }
  });
}

void merge_statistics(const WinogradArgs& a, float* stats) {
  const std::vector<double> counts = counts_of(a);
  const StatsMergeArgs merge{a.filters, 1, a.blocks, counts.data(), a.partials, stats};
  const auto run = FR_FOR_ACTIVE_ISA(stats_merge_range);
  parallel_over(a.filters, a.blocks, [&](int64_t begin, int64_t end) { run(merge, begin, end); });
}

void merge_sums(const WinogradArgs& a, const float* rstd, float* sums) {
  std::vector<double> totals(2 * a.filters);
  for (int64_t row = 0; row < 2; ++row)
    for (int64_t block = 0; block < a.blocks; ++block) {
      const float* partial = a.sums + (row * a.blocks + block) * a.filters;
      for (int64_t k = 0; k < a.filters; ++k) totals[row * a.filters + k] += partial[k];
    }
  for (int64_t k = 0; k < a.filters; ++k) {
    sums[k] = static_cast<float>(totals[k]);
    sums[a.filters + k] = static_cast<float>(rstd[k] * totals[a.filters + k]);
  }
}

}  // namespace

int64_t WinogradWeights::size(int64_t filters, int64_t channels) {
  return divide_up(filters, kPanel) * winograd_panel_size(channels);
}

bool WinogradWeights::pack(const char* op, const Tensor& weight, bool rotated, bool taps, float* packed) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": weight must be a float32 tensor of shape [K, C, 3, 3]");
  const auto strides = weight.strides();
  WinogradPackArgs a{};
  a.data = weight.const_data_ptr<float>() + (rotated ? 2 * strides[2] + 2 * strides[3] : 0);
  a.filter = strides[rotated ? 1 : 0], a.channel = strides[rotated ? 0 : 1];
  a.row = rotated ? -strides[2] : strides[2], a.column = rotated ? -strides[3] : strides[3];
  a.filters = weight.size(rotated ? 1 : 0), a.channels = weight.size(rotated ? 0 : 1);
  a.taps = taps;
  a.packed = packed;
  const auto run = FR_FOR_ACTIVE_ISA(winograd_pack);
  std::atomic<bool> finite{true};
  parallel_over(divide_up(a.filters, kPanel), winograd_panel_size(a.channels), [&](int64_t begin, int64_t end) {
    if (!run(a, begin, end)) finite.store(false);
  });
  return finite.load();
}

WinogradWeights::WinogradWeights(const char* op, const Tensor& weight, bool rotated) {
  static thread_local Scratch room;
  const int64_t filters = weight.size(rotated ? 1 : 0), channels = weight.size(rotated ? 0 : 1);
  auto* packed = room.reserve<float>(op, size(filters, channels) * sizeof(float));
  taps_ = !pack(op, weight, rotated, false, packed);
  if (taps_) pack(op, weight, rotated, true, packed);
  packed_ = packed;
}

Pixels pixels_of(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name, " must be float32");
  const int64_t pitch = pixel_pitch(t);
  STD_TORCH_CHECK(pitch > 0, op, ": ", name,
                  " must be 4-d and dense in channels_last, or a slice of the channels of such a tensor");
  return {t.const_data_ptr<float>(), pitch};
}

void set_geometry(WinogradArgs& a, const char* op, const Tensor& source, int64_t filters, int64_t pad_h,
                  int64_t pad_w) {
  STD_TORCH_CHECK(source.dim() == 4 && source.numel() > 0, op, ": the input must be 4-d and hold a value");
  a.channels = source.size(1), a.height = source.size(2), a.width = source.size(3);
  a.filters = filters;
  a.pad_h = pad_h, a.pad_w = pad_w;
  a.out_height = a.height + 2 * pad_h - 2, a.out_width = a.width + 2 * pad_w - 2;
  STD_TORCH_CHECK(a.out_height > 0 && a.out_width > 0, op, ": the input is smaller than the taps");
  a.tile_rows = divide_up(a.out_height, 2), a.tile_columns = divide_up(a.out_width, 2);
  a.tiles = source.size(0) * a.tile_rows * a.tile_columns;
  a.blocks = block_count(a);
}

void set_bias(WinogradArgs& a, const char* op, const std::optional<Tensor>& bias) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == a.filters && bias->is_contiguous() &&
                      bias->scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": bias must be a contiguous float32 tensor of shape [", a.filters, "]");
  a.bias = bias->const_data_ptr<float>();
}

Tensor set_output(WinogradArgs& a, const char* op, const Tensor& x, const std::optional<Tensor>& into) {
  const int64_t shape[] = {x.size(0), a.filters, a.out_height, a.out_width};
  Tensor out = into ? *into : new_channels_last(x, shape[0], shape[1], shape[2], shape[3]);
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(out.dim() == 4 && out.size(d) == shape[d], op, ": into must be [", shape[0], ", ", shape[1], ", ",
                    shape[2], ", ", shape[3], "]");
  a.out_pitch = pixels_of(op, "into", out).pitch;
  a.out = out.mutable_data_ptr<float>();
  return out;
}

void run_winograd(const char* op, WinogradArgs a, float* stats, float* sums, const float* rstd) {
  const int64_t size = a.blocks * a.filters;
  std::vector<float> partials(stats ? 3 * size : sums ? 2 * size : 0);
  a.statistics = stats != nullptr;
  if (stats) a.partials = {partials.data(), partials.data() + size, partials.data() + 2 * size};
  if (sums) a.sums = partials.data();
  run_tasks(op, a);
  if (stats) merge_statistics(a, stats);
  if (sums) merge_sums(a, rstd, sums);
}

Tensor new_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return torch::stable::transpose(torch::stable::transpose(torch::stable::new_empty(like, {n, h, w, c}), 1, 3), 2, 3);
}

void check_winograd(const char* op, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation must have two values each");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && stride[0] == 1 && stride[1] == 1 &&
                      dilation[0] == 1 && dilation[1] == 1 && padding[0] >= 0 && padding[1] >= 0,
                  op, ": takes 3x3 kernels with stride 1 and dilation 1");
}

}  // namespace fusedres
