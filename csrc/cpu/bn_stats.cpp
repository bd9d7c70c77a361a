#include "cpu/bn_stats.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/parallel.h"

namespace fusedres {
namespace {

std::vector<double> counts_of_parts(const Spans& spans) {
  const bool last = spans.layout == Layout::kChannelsLast;
  const int64_t length = last ? spans.pixels : spans.plane;
  const int64_t piece = last ? kStatsRows : kStatsPlane;
  const int64_t repeats = last ? 1 : spans.pixels / spans.plane;
  std::vector<double> counts;
  for (int64_t r = 0; r < repeats; ++r)
    for (int64_t at = 0; at < length; at += piece) counts.push_back(static_cast<double>(std::min(piece, length - at)));
  return counts;
}

Tensor bn_stats_cpu(const Tensor& x, bool per_sample, std::optional<Tensor> into) {
  constexpr const char* kOp = "bn_stats_cpu";
  STD_TORCH_CHECK(!per_sample && !into.has_value(), kOp, ": per_sample and into have no kernel yet");
  STD_TORCH_CHECK(x.numel() > 0, kOp, ": x holds no element");
  const Spans spans = Spans::of(x, common_layout(kOp, {&x}));
  const std::vector<double> counts = counts_of_parts(spans);
  const int64_t parts = static_cast<int64_t>(counts.size());
  const int64_t size = parts * spans.channels;
  std::vector<float> partials(3 * size);
  Tensor out = torch::stable::new_empty(x, {2, spans.channels}, torch::headeronly::ScalarType::Float);

  StatsArgs args{};
  args.dtype = dtype_of(kOp, x);
  args.channels_last = spans.layout == Layout::kChannelsLast;
  args.channels = spans.channels;
  args.pixels = spans.pixels;
  args.plane = spans.plane;
  args.parts = parts;
  args.x = x.const_data_ptr();
  args.partials = {partials.data(), partials.data() + size, partials.data() + 2 * size};
  const auto run = FR_FOR_ACTIVE_ISA(stats_range);
  parallel_over(parts, x.numel() / parts, [&](int64_t begin, int64_t end) { run(args, begin, end); });

  const StatsMergeArgs merge{spans.channels, parts, counts.data(), args.partials, out.mutable_data_ptr<float>()};
  const auto run_merge = FR_FOR_ACTIVE_ISA(stats_merge_range);
  parallel_over(spans.channels, parts, [&](int64_t begin, int64_t end) { run_merge(merge, begin, end); });
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("bn_stats_cpu", TORCH_BOX(&fusedres::bn_stats_cpu)); }
