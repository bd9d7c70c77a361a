// What the headers of the emulator ask of its machine: where a thread is, barriers, warp exchanges, memory, launches.
// All of it is compiled without sanitizers in src/, so that the machine never reports itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

namespace emu {

// ---------------------------------------------------------------------------------------------------------------------
// Where a thread is. Constant while a kernel runs: each thread has a fibre of its own.
// ---------------------------------------------------------------------------------------------------------------------

// By value and out of line, so that a kernel's instrumentation never sees the machine's own memory.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_dim();
__attribute__((const)) uint3 grid_dim();
__attribute__((const)) unsigned lane_index();

// Checks __launch_bounds__ at the start of a kernel.
void enter(unsigned most_threads, unsigned fewest_blocks = 0, unsigned most_blocks_in_cluster = 0);

// ---------------------------------------------------------------------------------------------------------------------
// Synchronisation
// ---------------------------------------------------------------------------------------------------------------------

// Named barrier `id` of the block; `count` threads take part, 0 for all.
void block_barrier(unsigned id = 0, unsigned count = 0);
// Sum over the block of `value`, and a barrier: __syncthreads_count and its relatives.
int block_sum(int value);
void grid_barrier();
// Gives way to other threads: inside loops that wait for what another thread does.
void spin(const char* what);
void memory_fence();

// ---------------------------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------------------------

constexpr unsigned kWarp = 32;

constexpr size_t kSlotBytes = 32;
using Slots = unsigned char[kWarp][kSlotBytes];
using Products = float[kWarp][4];

// What the lanes named by a mask publish to each other. Valid until the calling lane's next exchange.
struct Exchange;

// Waits for all lanes in `mask`, which must call with the same `what` and mask. `complete` runs once, on the last lane.
const Exchange& exchange(const char* what, unsigned mask, const void* mine, size_t bytes,
                         void (*complete)(const Slots&, Products&) = nullptr);
void read_slot(const Exchange& all, unsigned lane, void* to, size_t bytes);
void read_products(const Exchange& all, unsigned lane, float (&to)[4]);
// Fails where a lane reads one that its mask does not name.
void check_source(const char* what, unsigned mask, unsigned source);
// As an exchange of nothing that also orders memory among the lanes.
void warp_sync(unsigned mask);
unsigned active_lanes();

template <class T>
T shuffle(const char* what, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  const Exchange& all = exchange(what, mask, &value, sizeof value);
  check_source(what, mask, source);
  read_slot(all, source, &value, sizeof value);
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

void* dynamic_shared_bytes();
void* static_shared_bytes(const void* key, size_t size, size_t align);

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_bytes());
}

template <class T, int kDeclaration>
struct SharedKey {
  static inline char key;
};

// The block's variable of this declaration, uninitialised.
template <class T, int kDeclaration, size_t kAlign = 1>
T& static_shared() {
  constexpr size_t kBoth = kAlign > alignof(T) ? kAlign : alignof(T);
  return *static_cast<T*>(static_shared_bytes(&SharedKey<T, kDeclaration>::key, sizeof(T), kBoth));
}

size_t shared_address(const void* pointer);  // __cvta_generic_to_shared
void* shared_pointer(size_t address);

// An access that instructions of the emulator make for the calling thread; plain loads and stores report themselves.
enum class Access { kRead, kWrite, kAtomic };
void touch(const void* p, size_t bytes, Access access);
// After touch(): the copy itself, which is not reported again.
void read_quietly(void* to, const void* from, size_t bytes);
void write_quietly(void* to, const void* from, size_t bytes);

void copy_async(void* to, const void* from, size_t bytes, size_t source_bytes);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);
void copy_async_wait_all();

void mbarrier_init(uint64_t* barrier, unsigned count);
uint64_t mbarrier_arrive(uint64_t* barrier, unsigned count = 1);
void mbarrier_arrive_after_copies(uint64_t* barrier, bool counts);
bool mbarrier_passed(uint64_t* barrier, bool parity);

// ---------------------------------------------------------------------------------------------------------------------
// Errors and launches
// ---------------------------------------------------------------------------------------------------------------------

// Ends the launch; the message comes from cudaGetErrorString(cudaGetLastError()).
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Config {
  dim3 grid, block;
  size_t dynamic_shared;
  bool cooperative;

  Config(dim3 grid, dim3 block, size_t dynamic_shared = 0, const void* /*stream*/ = nullptr, bool cooperative = false)
      : grid(grid), block(block), dynamic_shared(dynamic_shared), cooperative(cooperative) {}
};

void run(const Config& config, const void* kernel, void (*entry)(void*), void* closure, size_t closure_bytes);

template <class... P, class... A>
void launch(const Config& config, void (*kernel)(P...), A&&... arguments) {
  struct Closure {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> parameters;
  } closure{kernel, {std::forward<A>(arguments)...}};
  const auto entry = [](void* p) {
    auto* c = static_cast<Closure*>(p);
    std::apply(c->kernel, c->parameters);
  };
  run(config, reinterpret_cast<const void*>(kernel), entry, &closure, sizeof closure);
}

}  // namespace emu

#define warpSize 32
