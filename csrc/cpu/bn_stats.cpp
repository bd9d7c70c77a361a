#include "cpu/bn_stats.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/parallel.h"

namespace fusedres {
namespace {

// How many values the partials of one result cover.
std::vector<double> counts_of(const Cut& cut) {
  std::vector<double> counts;
  for (int64_t part = 0; part < cut.parts_per_group(); ++part)
    counts.push_back(static_cast<double>(piece_at(cut.pieces, part).size));
  return counts;
}

Tensor bn_stats_cpu(const Tensor& x, bool per_sample, std::optional<Tensor> into) {
  constexpr const char* kOp = "bn_stats_cpu";
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have the 4 dimensions [N, C, H, W], got ", x.dim());
  if (into) check_matches(kOp, "into", *into, x);
  if (per_sample && x.size(0) == 0) return torch::stable::new_empty(x, {2, 0, x.size(1)}, kFloat);
  STD_TORCH_CHECK(x.numel() > 0, kOp, ": x holds no element");
  const Spans spans = Spans::of(x, shared_layout(kOp, {{"x", &x}, {"into", pointer_to(into)}}));
  const Cut cut(spans, per_sample, spans.layout == Layout::kChannelsLast ? kStatsRows : kStatsPlane);
  const std::vector<double> counts = counts_of(cut);
  const int64_t size = cut.parts * spans.channels;
  std::vector<float> partials(3 * size);
  Tensor out = per_sample ? torch::stable::new_empty(x, {2, x.size(0), spans.channels}, kFloat)
                          : torch::stable::new_empty(x, {2, spans.channels}, kFloat);

  StatsArgs args{};
  args.dtype = dtype_of(kOp, x);
  args.channels_last = spans.layout == Layout::kChannelsLast;
  args.channels = spans.channels;
  args.pieces = cut.pieces;
  args.x = x.const_data_ptr();
  args.x_pitch = spans.pitch_of(x);
  args.into = into ? into->mutable_data_ptr() : nullptr;
  args.into_pitch = into ? spans.pitch_of(*into) : 0;
  args.partials = {partials.data(), partials.data() + size, partials.data() + 2 * size};
  const auto run = FR_FOR_ACTIVE_ISA(stats_range);
  parallel_over(cut.parts, x.numel() / cut.parts, [&](int64_t begin, int64_t end) { run(args, begin, end); });

  const int64_t per_group = cut.parts_per_group();
  const StatsMergeArgs merge{spans.channels, cut.groups,    per_group,
                             counts.data(),  args.partials, out.mutable_data_ptr<float>()};
  const auto run_merge = FR_FOR_ACTIVE_ISA(stats_merge_range);
  parallel_over(cut.groups * spans.channels, per_group,
                [&](int64_t begin, int64_t end) { run_merge(merge, begin, end); });
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) { m.impl("bn_stats_cpu", TORCH_BOX(&fusedres::bn_stats_cpu)); }
