// A batch norm in training and the join behind it, in one launch; see fusedres/ops/bn_join.py.
//
// Three phases with all blocks waiting in between: the statistics of the blocks' rows; their merge, which makes the
// rows of the norm; the join, which reads the tensor again, from the L2 cache.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/bn_norm.h"
#include "cuda/bn_stats.h"
#include "cuda/cooperative.h"
#include "cuda/join.h"

namespace fusedres {
namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;
constexpr int kBlocksPerProcessor = 2;
constexpr int kJoinRows = 2;  // whose loads a thread has in flight

struct BnJoinArgs {
  StatsArgs stats;
  NormArgs norm;
  JoinArgs join;
};

// What the phases keep in shared memory, one after the other.
template <int kWidth>
union BnJoinShared {
  MomentShared<kWidth> moments;
  MomentSums slices[kThreads];
  typename Numbers<kWidth, kForwardNumbers>::Storage numbers;
};

// Merges the blocks' moments and writes the norm's rows: the blocks share the channels, a block's threads the parts.
template <class T>
__device__ __forceinline__ void merge_moments(const BnJoinArgs& a, MomentSums (&slices)[kThreads]) {
  const MomentPartials& partials = a.stats.partials;
  const int64_t channels = a.norm.channels;
  for_each_merged(channels, [&](int64_t c, bool inside, int slice, int count, int thread, int lanes) {
    MomentSums mine{};
#pragma unroll 4
    for (int64_t part = slice; part < partials.parts.parts; part += count) {
      if (!inside) break;
      mine.add(partials, part, c, partials.parts.count(part));
    }
    slices[thread] = mine;
    __syncthreads();
    if (!inside || slice != 0) return;
    for (int i = 1; i < count; ++i) {
      const MomentSums& other = slices[thread + i * lanes];
      mine = {mine.count + other.count, mine.plain + other.plain, mine.sum + other.sum, mine.square + other.square};
    }
    a.norm.write(c, mine.mean(origin<T>(a.stats, c)), mine.m2());
  });
}

template <class T, int kWidth, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) bn_join_kernel(const BnJoinArgs a) {
  __shared__ BnJoinShared<kWidth> shared;
  const auto grid = cooperative_groups::this_grid();
  stats_rows<T, kWidth>(a.stats, shared.moments);
  grid.sync();
  merge_moments<T>(a, shared.slices);
  grid.sync();
  join_rows<T, kWidth, kDropout, kJoinRows>(a.join, shared.numbers);
}

template <class V, bool kDropout>
bool launch(const Device& device, const Tensor& y, BnJoinArgs& args) {
  const Walk& walk = args.stats.walk;
  const Shape shape = shape_of(walk, V::width, kStatsUnroll, kBlocksPerProcessor, kMostColumns);
  const auto kernel = bn_join_kernel<typename V::Element, V::width, kDropout>;
  if (!runs_at_once(kernel, shape)) return false;
  const Parts parts = parts_of(walk, shape, false);
  Tensor partials = torch::stable::new_empty(y, {kMoments, parts.parts, walk.channels}, kFloat);
  args.stats.partials = {device.out<float>(partials), parts, walk.channels};
  launch_cooperative(kernel, shape, device, args);
  return true;
}

std::tuple<Tensor, Tensor> bn_join_cuda(const Tensor& y, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                                        std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                        double momentum, double eps, std::optional<Tensor> residual,
                                        std::optional<Tensor> res_norm, int64_t act, double act_param, double dropout,
                                        std::optional<Tensor> seed) {
  constexpr const char* kOp = "bn_join_cuda";
  const JoinGiven given{y, {}, residual, res_norm, act, act_param, {}, dropout, seed};
  given.check(kOp);
  STD_TORCH_CHECK(y.numel() > 0, kOp, ": y holds no element");
  const Device device(y);
  const int64_t channels = y.size(1);
  const double count = static_cast<double>(y.numel() / channels);
  const int64_t read = 1 + residual.has_value();
  Tensor out = torch::stable::empty_like(y);
  const Layout layout = shared_layout(kOp, {{"y", &y}, {"residual", pointer_to(residual)}, {"y", &out}});
  if (layout == Layout::kChannelsLast && stays_in_l2(read * y.numel() * y.element_size())) {
    const Spans spans = Spans::of(y, layout);
    Tensor rows = torch::stable::new_empty(y, {4, channels}, kFloat);
    BnJoinArgs args{};
    args.stats.walk = walk_of(spans, false);
    args.stats.x = input_of(device, spans, y);
    args.norm = norm_args(kOp, device, channels, count, gamma, beta, running_mean, running_var, momentum, eps, rows);
    static_cast<JoinOperands&>(args.join) = given.operands(kOp, device, spans, false);
    args.join.norm = {args.norm.out};
    args.join.out = output_of(device, spans, out);
    bool done = false;
    dispatch_vector(
        kOp, y, args.stats.walk, {args.join.y, args.join.residual, as_input(args.join.out)}, [&](auto vector) {
          using V = decltype(vector);
          done = args.join.dropout.active ? launch<V, true>(device, y, args) : launch<V, false>(device, y, args);
        });
    if (done) return {out, rows};
  }
  const Tensor stats = bn_stats_cuda(y, false, {});
  Tensor rows = bn_norm_cuda(stats, count, gamma, beta, running_mean, running_var, momentum, eps);
  return {join_cuda(y, rows, residual, res_norm, act, act_param, {}, dropout, seed), rows};
}

}  // namespace
}  // namespace fusedres

FR_CUDA_LIBRARY(m) { m.impl("bn_join_cuda", TORCH_BOX(&fusedres::bn_join_cuda)); }
