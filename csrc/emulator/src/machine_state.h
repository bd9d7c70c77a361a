// The state of a launch: threads, warps, blocks.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checker.h"
#include "emulator/machine.h"
#include "fibre.h"

namespace emu {

enum class State { kReady, kBarrier, kWarp, kGrid, kSpinning, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, source_bytes;
  bool done;
};

struct Block;

struct Position {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned lane, warp;
};

struct Exchange {
  Slots slots;
  Products products;
  const char* what;
  unsigned mask, arrived, holders, completed_by;
};

struct Thread {
  Position position;
  unsigned linear;
  Block* block;
  State state = State::kReady;
  Fibre fibre;
  Exchange* holds = nullptr;    // the exchange that it last took part in
  const char* waits = nullptr;  // for what, in words
  unsigned barrier_id = 0;
  std::deque<std::vector<Copy>> groups;  // committed copies, then the open group
  uint32_t epoch = 0;
  uint16_t grid_epoch = 0;
  uintptr_t stack = 0;
};

struct Warp {
  std::vector<std::unique_ptr<Exchange>> exchanges;
};

struct NamedBarrier {
  unsigned arrived = 0, expected = 0;
  std::vector<unsigned> threads;
};

struct Block {
  unsigned number;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live = 0, at_barrier = 0, at_grid = 0;
  int sum = 0, finished_sum = 0;
  std::map<unsigned, NamedBarrier> named;
  unsigned char* shared = nullptr;  // the window: dynamic, then static variables
  size_t dynamic_bytes = 0, static_end = 0;
  std::map<const void*, size_t> statics;
  std::map<size_t, std::vector<uint16_t>> barrier_clocks;
  unsigned hot = 0;  // the warp that runs ahead

  bool holds(const void* p) const;
};

constexpr size_t kWindow = 512 << 10;  // address space of a block's shared memory
constexpr size_t kBaseAddress = 1024;  // of the window, so that address 0 is never valid
constexpr size_t kGap = 32;            // between variables

struct Launch {
  const Config* config;
  const void* kernel;
  void (*entry)(void*);
  void* closure;
  size_t closure_bytes;
  std::vector<std::unique_ptr<Block>> blocks;  // those that run now
  unsigned at_grid = 0;
  uint64_t spins = 0;  // since a barrier was passed
  bool failed = false;
};

enum class Copies { kLate, kEarly, kRandom };

struct Machine {
  Thread* current = nullptr;
  Launch* launch = nullptr;
  Fibre scheduler;
  std::mt19937_64 random{1};
  Copies copies = Copies::kLate;
  Checker checker;
  bool checking = false;  // an access; a failure ends the check without returning from it
  std::string error;
  uint64_t launches = 0;
  uintptr_t stacks_begin = 0, stacks_end = 0;
};

Machine& machine();
std::string source_line(void* site);

#if defined(EMU_CHECK)
constexpr bool kChecks = true;
#else
constexpr bool kChecks = false;
#endif

}  // namespace emu
