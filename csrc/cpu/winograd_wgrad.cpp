#include <atomic>

#include "cpu/scratch.h"
#include "cpu/winograd_plan.h"

namespace fusedres {
namespace {

// Filters and channels of a task, at most: their sums and a block of tiles stay in a core's cache. And at least, where
// there are more threads than tasks: the fewer they are, the more often the same windows are transformed.
constexpr int64_t kMostOfTask = 64;
constexpr int64_t kFewestOfTask = 32;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many parts filters and channels are cut into. No result depends on it.
struct Parts {
  int64_t filters, channels;

  explicit Parts(const WinogradArgs& a)
      : filters(divide_up(a.filters, kMostOfTask)), channels(divide_up(a.channels, kMostOfTask)) {
    const int64_t threads = torch::stable::get_num_threads();
    while (filters * channels < threads) {
      const bool splits_filters = a.filters / filters >= a.channels / channels;
      if (std::max(a.filters / filters, a.channels / channels) < 2 * kFewestOfTask) break;
      (splits_filters ? filters : channels) *= 2;
    }
    const int64_t even = divide_up(filters, threads) * threads;
    if (filters * channels % threads != 0 && a.filters / even >= kFewestOfTask) filters = even;
  }
};

}  // namespace

bool run_winograd_wgrad(const char* op, const WinogradWgradArgs& a) {
  const WinogradArgs& conv = a.conv;
  const Parts parts(conv);
  const int64_t filters = divide_up(conv.filters, parts.filters);
  const int64_t channels = divide_up(divide_up(conv.channels, parts.channels), kPanel) * kPanel;
  const auto bytes = [](int64_t rows, int64_t columns) {
    return kPoints * rows * winograd_pitch(columns) * sizeof(float);
  };
  const auto run = FR_FOR_ACTIVE_ISA(winograd_wgrad_task);
  std::atomic<bool> finite{true};
  const int64_t across = divide_up(conv.channels, channels);
  torch::stable::parallel_for(0, parts.filters * across, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch window, grads, sums;
    auto* windows = window.reserve<float>(op, bytes(kWgradTiles, channels));
    auto* gradients = grads.reserve<float>(op, bytes(kWgradTiles, filters));
    auto* totals = sums.reserve<float>(op, bytes(filters, channels));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / across * filters, c = i % across * channels;
      const int64_t k_end = std::min(k + filters, conv.filters), c_end = std::min(c + channels, conv.channels);
      if (k < k_end && !run(a, WinogradWgradTask{k, k_end, c, c_end, windows, gradients, totals})) finite.store(false);
    }
  });
  return finite.load();
}

}  // namespace fusedres
