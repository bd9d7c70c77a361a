// A data race, to see that the sanitizer is at work.
#include <atomic>
#include <thread>

extern "C" long planted_race() {
  static long shared = 0;
  static std::atomic<int> inside{0};
  // Two at a time at least, without an order between them.
  inside.fetch_add(1, std::memory_order_relaxed);
  while (inside.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
  return ++shared;
}
