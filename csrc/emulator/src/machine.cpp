// The scheduler: fibres of a block or, in a cooperative launch, of all blocks; barriers, warp exchanges, copies.
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "device.h"
#include "machine_state.h"

#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>  // its macros do nothing here, where no access is instrumented
#endif
#if defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* p, size_t bytes);
extern "C" void __tsan_write_range(void* p, size_t bytes);
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace emu {

Machine& machine() {
  static Machine* m = new Machine;  // never destroyed: kernels may run while the process ends
  return *m;
}

namespace {

constexpr uint64_t kSpinLimit = 500'000;

Thread& self() { return *machine().current; }

// -- what ThreadSanitizer must be told: a barrier orders everything before it before everything after it
// ---------------

void tsan_release([[maybe_unused]] void* address) {
#if defined(EMU_TSAN)
  __tsan_release(address);
#endif
}
void tsan_acquire([[maybe_unused]] void* address) {
#if defined(EMU_TSAN)
  __tsan_acquire(address);
#endif
}

// The machine's own accesses are no kernel's: the sanitizer sees them where it intercepts memcpy and the like.
struct Quiet {
#if defined(EMU_TSAN)
  Quiet() { __tsan_ignore_thread_begin(); }
  ~Quiet() { __tsan_ignore_thread_end(); }
#else
  Quiet() {}
#endif
};

// Two addresses in turn, so that a thread that wakes late does not also see what the others did since.
[[maybe_unused]] void* in_turn(void* address, uint32_t epoch) { return static_cast<char*>(address) + epoch % 2; }

// -- switching --------------------------------------------------------------------------------------------------------

void pause(State state, const char* what) {
  Thread& me = self();
  me.state = state;
  me.waits = what;
  me.fibre.switch_to(machine().scheduler);
}

void run_thread() {
  Thread& me = self();
  me.fibre.arrived();
  Launch& launch = *machine().launch;
  tsan_acquire(&launch.config);
  launch.entry(launch.closure);
  copy_async_wait_all();
  tsan_release(&launch.closure);  // not where threads begin: an early end happens before no late beginning
  me.state = State::kDone;
  --me.block->live;
  me.fibre.switch_to(machine().scheduler, true);
  abort();
}

unsigned char* stack_number(size_t i) {
  constexpr size_t kRegion = Fibre::kStackBytes * kThreadsPerBlock * kBlocksTogether;  // of addresses, not of memory
  Machine& m = machine();
  if (m.stacks_begin == 0) {
    void* p = mmap(nullptr, kRegion, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    m.stacks_begin = reinterpret_cast<uintptr_t>(p);
    m.stacks_end = m.stacks_begin + kRegion;
  }
  const uintptr_t at = m.stacks_begin + i * Fibre::kStackBytes;
  if (at + Fibre::kStackBytes > m.stacks_end) abort();
  return reinterpret_cast<unsigned char*>(at);
}

unsigned char* window_number(size_t i) {
  static std::vector<unsigned char*> windows;
  while (windows.size() <= i) {
    void* p = mmap(nullptr, kWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    windows.push_back(static_cast<unsigned char*>(p));
  }
  return windows[i];
}

void set_accessible([[maybe_unused]] Block& b, [[maybe_unused]] size_t offset, [[maybe_unused]] size_t bytes) {
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(b.shared + offset, bytes);
#endif
  if (kChecks) machine().checker.add_shared(offset, bytes);
}

// -- blocks -----------------------------------------------------------------------------------------------------------

dim3 index_of(const Config& c, unsigned number) {
  return {number % c.grid.x, number / c.grid.x % c.grid.y, number / (c.grid.x * c.grid.y)};
}

std::unique_ptr<Block> make_block(const Config& c, unsigned number, size_t place) {
  Machine& m = machine();
  auto block = std::make_unique<Block>();
  const unsigned n = c.block.x * c.block.y * c.block.z;
  block->number = number;
  block->live = n;
  block->dynamic_bytes = c.dynamic_shared;
  block->shared = window_number(place);
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(block->shared, kWindow);
#endif
  memset(block->shared, 0xff, kWindow);  // NaN in every floating type, and no plausible index
#if defined(EMU_ASAN)
  __asan_poison_memory_region(block->shared, kWindow);
#endif
  block->static_end = kBaseAddress + (c.dynamic_shared + kGap + 127) / 128 * 128;
  block->warps = std::vector<Warp>((n + kWarp - 1) / kWarp);
  block->threads = std::vector<Thread>(n);
  if (kChecks) m.checker.begin_block(number, c.dynamic_shared, n);
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = block->threads[i];
    const uint3 index{i % c.block.x, i / c.block.x % c.block.y, i / (c.block.x * c.block.y)};
    t.position = {index, index_of(c, number), c.block, c.grid, i % kWarp, i / kWarp};
    t.linear = i;
    t.block = block.get();
    t.groups.resize(1);
    unsigned char* stack = stack_number(place * kThreadsPerBlock + i);
    t.stack = reinterpret_cast<uintptr_t>(stack);
#if defined(EMU_ASAN)
    __asan_unpoison_memory_region(stack, Fibre::kStackBytes);
#endif
    t.fibre.start(stack, run_thread);
  }
  if (c.dynamic_shared > 0) {
    m.current = &block->threads[0];  // the checker asks whose block it is
    set_accessible(*block, kBaseAddress, c.dynamic_shared);
    m.current = nullptr;
  }
  return block;
}

// Lets one warp run: its lanes in random order, each as far as it gets.
void run_warp(Block& b, unsigned warp) {
  Machine& m = machine();
  unsigned order[kWarp];
  const unsigned first = warp * kWarp;
  const unsigned lanes = std::min<unsigned>(kWarp, static_cast<unsigned>(b.threads.size()) - first);
  std::iota(order, order + lanes, 0u);
  std::shuffle(order, order + lanes, m.random);
  for (unsigned i = 0; i < lanes && !m.launch->failed; ++i) {
    Thread& t = b.threads[first + order[i]];
    if (t.state == State::kSpinning) t.state = State::kReady;
    if (t.state != State::kReady) continue;
    m.current = &t;
    m.scheduler.switch_to(t.fibre);
    m.current = nullptr;
  }
}

bool runnable(const Block& b, unsigned warp) {
  const unsigned end = std::min<unsigned>((warp + 1) * kWarp, static_cast<unsigned>(b.threads.size()));
  return std::any_of(b.threads.begin() + warp * kWarp, b.threads.begin() + end,
                     [](const Thread& t) { return t.state == State::kReady || t.state == State::kSpinning; });
}

// One warp runs far ahead of the others, so that a missing barrier gives a wrong result; now and then it is another.
bool step(Block& b) {
  Machine& m = machine();
  const unsigned warps = static_cast<unsigned>(b.warps.size());
  if (m.random() % 64 == 0) b.hot = static_cast<unsigned>(m.random() % warps);
  for (unsigned k = 0; k < warps; ++k) {
    const unsigned warp = (b.hot + k) % warps;
    if (!runnable(b, warp)) continue;
    const uint64_t spins = m.launch->spins;
    run_warp(b, warp);
    b.hot = m.launch->spins == spins ? warp : static_cast<unsigned>(m.random() % warps);
    return true;
  }
  return false;
}

void record(const std::string& text) {
  Machine& m = machine();
  m.launch->failed = true;
  if (m.error.empty()) m.error = text;
}

std::string describe(const Thread& t) {
  const Position& p = t.position;
  char text[160];
  snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", p.thread.x, p.thread.y, p.thread.z, p.block.x,
           p.block.y, p.block.z);
  return text;
}

// Nobody can go on: says who waits for what.
void report_deadlock() {
  std::map<std::string, std::pair<unsigned, const Thread*>> waiting;
  unsigned exited = 0;
  const Thread* first_exited = nullptr;
  for (const auto& b : machine().launch->blocks)
    for (const Thread& t : b->threads) {
      if (t.state == State::kDone) {
        ++exited;
        first_exited = first_exited ? first_exited : &t;
        continue;
      }
      auto& entry = waiting[t.waits ? t.waits : "nothing"];
      ++entry.first;
      entry.second = entry.second ? entry.second : &t;
    }
  std::string text = "divergence: no thread can go on;";
  for (const auto& [what, entry] : waiting)
    text += " " + std::to_string(entry.first) + " wait at " + what + " (" + describe(*entry.second) + ");";
  if (exited) text += " " + std::to_string(exited) + " have exited (" + describe(*first_exited) + ")";
  record(text);
}

void run_live_blocks() {
  Machine& m = machine();
  Launch& launch = *m.launch;
  const auto live = [&] {
    return std::any_of(launch.blocks.begin(), launch.blocks.end(), [](const auto& b) { return b->live > 0; });
  };
  while (live() && !launch.failed) {
    const size_t start = m.random() % launch.blocks.size();
    bool progress = false;
    for (size_t i = 0; i < launch.blocks.size() && !launch.failed && !progress; ++i) {
      Block& b = *launch.blocks[(start + i) % launch.blocks.size()];
      for (int steps = 0; steps < 256 && !launch.failed && step(b); ++steps) progress = true;
    }
    if (!progress && !launch.failed) report_deadlock();
    if (launch.spins > kSpinLimit && !launch.failed) report_deadlock();
  }
}

// Static memory is known once a block has run. With the dynamic it must fit into what the kernel may have.
void check_shared_limits(const Block& b, size_t most) {
  const size_t used = b.static_end - kBaseAddress - (b.dynamic_bytes + kGap + 127) / 128 * 128;
  const size_t bytes = used - std::min(used, b.statics.size() * kGap);
  if (bytes > kStaticSharedLimit)
    record("a block has " + std::to_string(bytes) + " bytes of static shared memory; the limit is 48 KiB");
  else if (bytes > 0 && bytes + b.dynamic_bytes > most)
    record("a block has " + std::to_string(bytes) + " bytes of static and " + std::to_string(b.dynamic_bytes) +
           " of dynamic shared memory; the limit of both is " + std::to_string(most >> 10) + " KiB");
}

}  // namespace

bool Block::holds(const void* p) const {
  const auto* c = static_cast<const unsigned char*>(p);
  return c >= shared && c < shared + kWindow;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

void run(const Config& config, const void* kernel, void (*entry)(void*), void* closure, size_t closure_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Quiet quiet;
  Machine& m = machine();
  if (!launch_is_valid(config, kernel)) return;
  Launch launch{&config, kernel, entry, closure, closure_bytes, {}};
  m.launch = &launch;
  m.error.clear();
  if (kChecks) m.checker.begin_launch();
  ++m.launches;

  std::vector<unsigned> order(size_t{config.grid.x} * config.grid.y * config.grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), m.random);
  const size_t together = config.cooperative ? order.size() : 1;
  for (size_t at = 0; at < order.size() && !launch.failed; at += together) {
    for (size_t i = 0; i < together; ++i) launch.blocks.push_back(make_block(config, order[at + i], i));
    tsan_release(&launch.config);
    run_live_blocks();
    tsan_acquire(&launch.closure);
    for (auto& b : launch.blocks) {
      if (!launch.failed) check_shared_limits(*b, most_shared(kernel));
      if (kChecks) m.checker.end_block(b->number);
      // Those of a failed launch are in the middle of something.
      for (Thread& t : b->threads)
        if (!launch.failed) t.fibre.release();
    }
    launch.blocks.clear();
  }
  m.launch = nullptr;
  m.current = nullptr;
  if (launch.failed) set_launch_failure(m.error);
}

void fail(const char* format, ...) {
  const Quiet quiet;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Machine& m = machine();
  if (m.current == nullptr) {
    fprintf(stderr, "cuda emulator: %s\n", text);
    abort();
  }
  record(std::string(text) + " [" + describe(self()) + "]");
  m.checking = false;
  self().fibre.switch_to(m.scheduler, true);
  abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// Position and barriers
// ---------------------------------------------------------------------------------------------------------------------

uint3 thread_index() { return self().position.thread; }
uint3 block_index() { return self().position.block; }
uint3 block_dim() { return self().position.block_dim; }
uint3 grid_dim() { return self().position.grid_dim; }
unsigned lane_index() { return self().position.lane; }

void enter(unsigned most_threads, unsigned, unsigned) {
  const dim3 d = self().position.block_dim;
  if (d.x * d.y * d.z > most_threads)
    fail("launch: %u threads per block, but __launch_bounds__ allows %u", d.x * d.y * d.z, most_threads);
}

namespace {

void wake_block(Block& b) {
  for (Thread& t : b.threads)
    if (t.state == State::kBarrier && t.barrier_id == 0) t.state = State::kReady;
}

void named_barrier(unsigned id, unsigned count) {
  Thread& me = self();
  Block& b = *me.block;
  if (count % kWarp != 0) fail("bar.sync %u, %u: the count must be a multiple of 32", id, count);
  NamedBarrier& barrier = b.named[id];
  if (barrier.arrived > 0 && barrier.expected != count)
    fail("bar.sync %u is called with %u threads and with %u", id, barrier.expected, count);
  barrier.expected = count;
  barrier.threads.push_back(me.linear);
  tsan_release(&barrier);
  if (++barrier.arrived == count) {
    if (kChecks) machine().checker.clocks(b.number).join(barrier.threads);
    for (const unsigned i : barrier.threads) b.threads[i].state = State::kReady;
    barrier.arrived = 0;
    barrier.threads.clear();
  } else {
    me.barrier_id = id;
    pause(State::kBarrier, "bar.sync with a count");
  }
  tsan_acquire(&barrier);
}

}  // namespace

void block_barrier(unsigned id, unsigned count) {
  const Quiet quiet;
  Thread& me = self();
  Block& b = *me.block;
  if (count != 0 || id != 0) return named_barrier(id, count ? count : static_cast<unsigned>(b.threads.size()));
  tsan_release(in_turn(&b, me.epoch));
  me.barrier_id = 0;
  if (++b.at_barrier == b.threads.size()) {
    b.at_barrier = 0;
    b.finished_sum = b.sum;
    b.sum = 0;
    machine().launch->spins = 0;
    wake_block(b);
  } else {
    pause(State::kBarrier, "__syncthreads");
  }
  tsan_acquire(in_turn(&b, me.epoch));
  ++me.epoch;
}

int block_sum(int value) {
  const Quiet quiet;
  Block& b = *self().block;
  b.sum += value;
  block_barrier();
  const int sum = b.finished_sum;
  block_barrier();  // nobody may begin another sum before everyone has read this one
  return sum;
}

void grid_barrier() {
  const Quiet quiet;
  Thread& me = self();
  Launch& launch = *machine().launch;
  if (!launch.config->cooperative) fail("grid barrier in a kernel that was not launched as cooperative");
  size_t threads = 0;
  for (const auto& b : launch.blocks) threads += b->threads.size();
  tsan_release(in_turn(&launch, me.grid_epoch));
  if (++launch.at_grid == threads) {
    launch.at_grid = 0;
    launch.spins = 0;
    for (auto& b : launch.blocks)
      for (Thread& t : b->threads)
        if (t.state == State::kGrid) t.state = State::kReady;
  } else {
    pause(State::kGrid, "a grid barrier");
  }
  tsan_acquire(in_turn(&launch, me.grid_epoch));
  ++me.epoch;
  ++me.grid_epoch;
}

void spin(const char* what) {
  const Quiet quiet;
  ++machine().launch->spins;
  pause(State::kSpinning, what);
}

void memory_fence() {}

// ---------------------------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------------------------

namespace {

Exchange& join_exchange(Warp& warp, const char* what, unsigned mask) {
  for (auto& e : warp.exchanges)
    if (e->arrived != 0 && e->arrived != e->mask && e->mask == mask && strcmp(e->what, what) == 0) return *e;
  for (auto& e : warp.exchanges)
    if (e->holders == 0 && e->arrived == 0) {
      e->mask = mask;
      e->what = what;
      return *e;
    }
  warp.exchanges.push_back(std::make_unique<Exchange>());
  Exchange& fresh = *warp.exchanges.back();
  fresh.what = what;
  fresh.mask = mask;
  fresh.arrived = fresh.holders = 0;
  return fresh;
}

void let_go(Thread& t) {
  if (t.holds != nullptr && --t.holds->holders == 0) t.holds->arrived = 0;
  t.holds = nullptr;
}

void check_mask(const char* what, unsigned mask) {
  const Thread& me = self();
  const Block& b = *me.block;
  const unsigned lane = me.position.lane;
  if (!(mask >> lane & 1)) fail("%s: lane %u calls with mask 0x%08x, which does not name it", what, lane, mask);
  for (unsigned other = 0; other < kWarp; ++other) {
    const unsigned i = me.position.warp * kWarp + other;
    if (!(mask >> other & 1)) continue;
    if (i >= b.threads.size()) fail("%s: mask 0x%08x names lane %u, which the block does not have", what, mask, other);
    if (b.threads[i].state == State::kDone) fail("%s: mask 0x%08x names lane %u, which has exited", what, mask, other);
  }
}

}  // namespace

const Exchange& exchange(const char* what, unsigned mask, const void* mine, size_t bytes,
                         void (*complete)(const Slots&, Products&)) {
  const Quiet quiet;
  Thread& me = self();
  check_mask(what, mask);
  let_go(me);
  Warp& warp = me.block->warps[me.position.warp];
  Exchange& e = join_exchange(warp, what, mask);
  memset(e.slots[me.position.lane], 0xff, kSlotBytes);
  if (bytes > 0) memcpy(e.slots[me.position.lane], mine, bytes);
  e.arrived |= 1u << me.position.lane;
  ++e.holders;
  me.holds = &e;
  if (e.arrived == mask) {
    e.completed_by = me.linear;
    if (complete != nullptr) complete(e.slots, e.products);
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1 && lane != me.position.lane)
        me.block->threads[me.position.warp * kWarp + lane].state = State::kReady;
  } else {
    pause(State::kWarp, what);
  }
  return e;
}

void read_slot(const Exchange& all, unsigned lane, void* to, size_t bytes) {
  const Quiet quiet;
  memcpy(to, all.slots[lane], bytes);
}

void read_products(const Exchange& all, unsigned lane, float (&to)[4]) {
  const Quiet quiet;
  memcpy(to, all.products[lane], sizeof to);
}

void warp_sync(unsigned mask) {
  const Quiet quiet;
  Thread& me = self();
  void* address = &me.block->warps[me.position.warp];
  tsan_release(address);
  const bool last = exchange("__syncwarp", mask, nullptr, 0).completed_by == me.linear;
  if (kChecks && last) {
    std::vector<unsigned> threads;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) threads.push_back(me.position.warp * kWarp + lane);
    machine().checker.clocks(me.block->number).join(threads);
  }
  tsan_acquire(address);
}

unsigned active_lanes() {
  const Quiet quiet;
  const Thread& me = self();
  unsigned mask = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const size_t i = me.position.warp * kWarp + lane;
    if (i < me.block->threads.size() && me.block->threads[i].state != State::kDone) mask |= 1u << lane;
  }
  return mask;
}

void check_source(const char* what, unsigned mask, unsigned source) {
  if (!(mask >> source & 1)) fail("%s: reads lane %u, which mask 0x%08x does not name", what, source, mask);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory
// ---------------------------------------------------------------------------------------------------------------------

void* dynamic_shared_bytes() {
  const Quiet quiet;
  Block& b = *self().block;
  if (b.dynamic_bytes == 0) fail("the kernel uses dynamic shared memory, but its launch gives none");
  return b.shared + kBaseAddress;
}

void* static_shared_bytes(const void* key, size_t size, size_t align) {
  const Quiet quiet;
  Block& b = *self().block;
  auto found = b.statics.find(key);
  if (found == b.statics.end()) {
    const size_t step = std::max<size_t>(align, 16);
    const size_t offset = (b.static_end + step - 1) / step * step;
    if (offset + size > kWindow) fail("static shared memory exceeds 48 KiB");
    b.static_end = offset + size + kGap;
    found = b.statics.emplace(key, offset).first;
    set_accessible(b, offset, size);
  }
  return b.shared + found->second;
}

size_t shared_address(const void* pointer) {
  const Block& b = *self().block;
  if (!b.holds(pointer)) fail("__cvta_generic_to_shared: %p is not in the block's shared memory", pointer);
  return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - b.shared);
}

void* shared_pointer(size_t address) {
  if (address >= kWindow) fail("%zu is no shared memory address", address);
  return self().block->shared + address;
}

void touch(const void* p, size_t bytes, Access access) {
  if (kChecks) machine().checker.access(p, bytes, access, __builtin_return_address(0), true);
#if defined(EMU_ASAN)
  if (__asan_region_is_poisoned(const_cast<void*>(p), bytes) != nullptr)
    fail("an access of %zu bytes at %p is out of bounds", bytes, p);
#endif
#if defined(EMU_TSAN)
  if (access == Access::kRead) __tsan_read_range(const_cast<void*>(p), bytes);
  if (access == Access::kWrite) __tsan_write_range(const_cast<void*>(p), bytes);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies
// ---------------------------------------------------------------------------------------------------------------------

namespace {

void perform(Copy& copy) {
  if (copy.done) return;
  memcpy(copy.to, copy.from, copy.source_bytes);
  memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.done = true;
}

void finish_front(Thread& t) {
  const Quiet quiet;
  for (Copy& copy : t.groups.front()) {
    perform(copy);
    if (kChecks) machine().checker.finish_copy(copy.to, copy.bytes);
  }
  t.groups.pop_front();
}

}  // namespace

void read_quietly(void* to, const void* from, size_t bytes) {
  const Quiet quiet;
  memcpy(to, from, bytes);
}
void write_quietly(void* to, const void* from, size_t bytes) {
  const Quiet quiet;
  memcpy(to, from, bytes);
}

void copy_async(void* to, const void* from, size_t bytes, size_t source_bytes) {
  Machine& m = machine();
  Thread& me = self();
  if (!me.block->holds(to)) fail("cp.async: the destination %p is not shared memory", to);
  if (source_bytes > bytes) fail("cp.async: reads %zu bytes to write %zu", source_bytes, bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes || (source_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async: source %p and destination %p must be aligned to %zu bytes", from, to, bytes);
  if (source_bytes) touch(from, source_bytes, Access::kRead);
#if defined(EMU_ASAN) || defined(EMU_TSAN)
  touch(to, bytes, Access::kWrite);
#endif
  if (kChecks) m.checker.start_copy(to, bytes, __builtin_return_address(0));
  const Quiet quiet;
  Copy copy{to, from, bytes, source_bytes, false};
  const bool now = m.copies == Copies::kEarly || (m.copies == Copies::kRandom && m.random() % 2);
  if (now) perform(copy);
  me.groups.back().push_back(copy);
}

void copy_async_commit() {
  const Quiet quiet;
  self().groups.emplace_back();
}

void copy_async_wait(unsigned groups_left) {
  const Quiet quiet;
  Thread& me = self();
  while (me.groups.size() - 1 > groups_left) finish_front(me);
}

void copy_async_wait_all() {
  copy_async_commit();
  copy_async_wait(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier: a word of shared memory that holds the phase, the arrivals that are missing and those that a phase needs
// ---------------------------------------------------------------------------------------------------------------------

namespace {

struct BarrierWord {
  uint32_t phase : 1, valid : 11, missing : 20;
  uint32_t needed;
};
static_assert(sizeof(BarrierWord) == 8);
constexpr unsigned kValid = 0x2a5;

BarrierWord read_barrier(uint64_t* barrier) {
  if (!self().block->holds(barrier)) fail("mbarrier: %p is not shared memory", static_cast<void*>(barrier));
  BarrierWord word;
  memcpy(&word, barrier, 8);
  if (word.valid != kValid) fail("mbarrier: used before mbarrier.init");
  return word;
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned count) {
  const Quiet quiet;
  touch(barrier, 8, Access::kWrite);
  BarrierWord word{0, kValid, count, count};
  memcpy(barrier, &word, 8);
}

uint64_t mbarrier_arrive(uint64_t* barrier, unsigned count) {
  const Quiet quiet;
  Thread& me = self();
  touch(barrier, 8, Access::kAtomic);
  BarrierWord word = read_barrier(barrier);
  if (word.missing < count) fail("mbarrier: more arrivals than the %u of its phase", word.needed);
  if (kChecks)
    machine().checker.clocks(me.block->number).release(me.linear, me.block->barrier_clocks[shared_address(barrier)]);
  tsan_release(barrier);
  const uint64_t state = word.phase;
  word.missing -= count;
  if (word.missing == 0) {
    word.phase ^= 1;
    word.missing = word.needed;
    machine().launch->spins = 0;
  }
  memcpy(barrier, &word, 8);
  return state;
}

// The arrival happens once the thread's copies so far are there, which no later arrival of the thread may depend on:
// here the copies complete at once.
void mbarrier_arrive_after_copies(uint64_t* barrier, bool counts) {
  copy_async_wait_all();
  if (counts) mbarrier_arrive(barrier);
}

bool mbarrier_passed(uint64_t* barrier, bool parity) {
  const Quiet quiet;
  Thread& me = self();
  spin("an mbarrier");
  touch(barrier, 8, Access::kAtomic);
  const BarrierWord word = read_barrier(barrier);
  if (word.phase == parity) return false;
  if (kChecks)
    machine().checker.clocks(me.block->number).acquire(me.linear, me.block->barrier_clocks[shared_address(barrier)]);
  tsan_acquire(barrier);
  return true;
}

}  // namespace emu
