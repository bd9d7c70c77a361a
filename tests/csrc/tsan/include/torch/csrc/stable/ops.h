// torch::stable::parallel_for on threads whose beginning and end ThreadSanitizer sees; libtorch's come from an OpenMP
// run time that is not instrumented, where everything would look like a race.
#pragma once

#define parallel_for parallel_for_of_libtorch
#define get_num_threads get_num_threads_of_libtorch
#include_next <torch/csrc/stable/ops.h>
#undef parallel_for
#undef get_num_threads

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t get_num_threads() { return 3; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t most = (end - begin) / std::max<int64_t>(grain, 1), count = end - begin;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(get_num_threads(), most));
  std::vector<std::thread> threads;
  for (int64_t part = 1; part < parts; ++part)
    threads.emplace_back([&, part] { f(begin + count * part / parts, begin + count * (part + 1) / parts); });
  f(begin, begin + count / parts);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
