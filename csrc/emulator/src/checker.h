// Sees every load and store of a kernel built in "check" mode: bounds, uninitialised reads, races, copies in flight,
// alignment, coalescing and bank conflicts. In other modes it is never called.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/machine.h"

namespace emu {

// When a thread did something: enough to tell what happened before what.
struct Moment {
  uint32_t block;
  uint32_t epoch;  // block barriers that the thread had passed
  uint16_t thread;
  uint16_t clock;  // warp barriers, named barriers and mbarriers that it had passed
  uint16_t grid;   // grid barriers
  uint16_t site;   // index of the instruction's address; 0: it never happened
};

// One byte's history.
struct Cell {
  Moment write, reads[2];
  bool initialised, in_flight, atomic;
};

// Vector clocks for what barriers of the whole block do not order.
class Clocks {
 public:
  void reset(unsigned threads);
  bool reached(unsigned thread, unsigned other, uint16_t clock) const { return known_[thread * n_ + other] >= clock; }
  uint16_t own(unsigned thread) const { return known_[thread * n_ + thread]; }
  // Everything before happens before everything after, among these threads.
  void join(const std::vector<unsigned>& threads);
  void release(unsigned thread, std::vector<uint16_t>& into);
  void acquire(unsigned thread, const std::vector<uint16_t>& from);

 private:
  unsigned n_ = 0;
  std::vector<uint16_t> known_;
};

// Memory-access statistics of one instruction.
struct Traffic {
  uint64_t requests = 0, units = 0, ideal = 0;  // sectors of 32 bytes, or passes over the banks
};

class Checker {
 public:
  void begin_launch();
  void begin_block(unsigned block, size_t dynamic_bytes, unsigned threads);
  void end_block(unsigned block);
  void add_shared(size_t offset, size_t bytes);

  // Memory on the device, which an access must lie in once anything is declared.
  void declare(const void* p, size_t bytes, bool initialised);
  void forget(const void* p);
  void forget_all();
  void initialise(const void* p, size_t bytes);

  void access(const void* p, size_t bytes, Access access, void* site, bool aligned);
  void start_copy(const void* to, size_t bytes, void* site);
  void finish_copy(const void* to, size_t bytes);

  std::string report() const;
  void clear_traffic() { traffic_.clear(); }
  bool counting = false;

  Clocks& clocks(unsigned block) { return blocks_[block].clocks; }

 private:
  struct Block {
    std::vector<Cell> shared;
    std::vector<bool> allocated;
    Clocks clocks;
    std::vector<std::unordered_map<uint16_t, uint32_t>> executions;  // per thread, how often an instruction ran
    std::unordered_map<uint64_t, std::vector<std::pair<uintptr_t, unsigned>>> requests;
  };
  // Which bytes hold a value: all, or those with a flag; a page of flags exists once one of its bytes has one.
  struct Range {
    static constexpr size_t kPage = 4096;
    size_t bytes = 0;
    bool whole = false;
    std::unordered_map<size_t, std::bitset<kPage>> flags = {};

    bool has(size_t i) const {
      if (whole) return true;
      const auto found = flags.find(i / kPage);
      return found != flags.end() && found->second[i % kPage];
    }
    void set(size_t i) {
      if (!whole) flags[i / kPage].set(i % kPage);
    }
    // What `other`, which begins at byte `at` of this range, has.
    void take(const Range& other, size_t at) {
      for (size_t i = 0; i < other.bytes && other.whole; ++i) set(at + i);
      for (const auto& [page, bits] : other.flags)
        for (size_t i = 0; i < kPage; ++i)
          if (bits[i]) set(at + page * kPage + i);
    }
  };

  uint16_t site_index(void* site);
  Moment now(uint16_t site) const;
  bool happened_before(const Moment& earlier, const Moment& later) const;
  void check_cell(Cell& cell, const Moment& moment, Access access, const char* space, size_t address);
  void access_global(uintptr_t p, size_t bytes, Access access, const Moment& moment);
  [[noreturn]] void race(const char* what, const char* space, size_t address, const Moment& a, const Moment& b) const;
  std::string place(const Moment& moment) const;
  void count(Block& block, uintptr_t p, size_t bytes, const Moment& moment, bool shared, bool write);
  void settle(Block& block);

  std::unordered_map<unsigned, Block> blocks_;
  std::unordered_map<uintptr_t, std::vector<Cell>> pages_;
  std::map<uintptr_t, Range> ranges_;
  std::vector<void*> sites_{nullptr};
  std::unordered_map<void*, uint16_t> site_of_;
  std::map<std::pair<uint16_t, bool>, Traffic> traffic_;  // by instruction, and whether it was shared memory
};

}  // namespace emu
