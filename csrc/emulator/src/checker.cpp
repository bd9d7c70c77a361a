#include "checker.h"

#include <stdio.h>

#include <algorithm>
#include <set>

#include "machine_state.h"

extern "C" char __ehdr_start, _end;  // of this module, from the linker

namespace emu {

// ---------------------------------------------------------------------------------------------------------------------
// Clocks
// ---------------------------------------------------------------------------------------------------------------------

void Clocks::reset(unsigned threads) {
  n_ = threads;
  known_.assign(size_t{n_} * n_, 0);
  for (unsigned t = 0; t < n_; ++t) known_[t * n_ + t] = 1;
}

void Clocks::join(const std::vector<unsigned>& threads) {
  std::vector<uint16_t> all(n_, 0);
  for (const unsigned t : threads)
    for (unsigned i = 0; i < n_; ++i) all[i] = std::max(all[i], known_[t * n_ + i]);
  for (const unsigned t : threads) {
    std::copy(all.begin(), all.end(), known_.begin() + t * n_);
    ++known_[t * n_ + t];
  }
}

void Clocks::release(unsigned thread, std::vector<uint16_t>& into) {
  into.resize(n_, 0);
  for (unsigned i = 0; i < n_; ++i) into[i] = std::max(into[i], known_[thread * n_ + i]);
  ++known_[thread * n_ + thread];
}

void Clocks::acquire(unsigned thread, const std::vector<uint16_t>& from) {
  for (unsigned i = 0; i < std::min<size_t>(n_, from.size()); ++i)
    known_[thread * n_ + i] = std::max(known_[thread * n_ + i], from[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks and declared memory
// ---------------------------------------------------------------------------------------------------------------------

void Checker::begin_launch() {
  pages_.clear();
  blocks_.clear();
}

void Checker::begin_block(unsigned number, size_t, unsigned threads) {
  Block& block = blocks_[number];
  block.clocks.reset(threads);
  block.executions.resize(threads);
}

void Checker::end_block(unsigned number) {
  settle(blocks_[number]);
  blocks_.erase(number);
}

void Checker::add_shared(size_t offset, size_t bytes) {
  Block& block = blocks_[machine().current->block->number];
  const size_t end = std::max(block.allocated.size(), offset + bytes);
  block.allocated.resize(end);
  block.shared.resize(end);
  std::fill(block.allocated.begin() + offset, block.allocated.begin() + offset + bytes, true);
}

// Ranges that overlap become one; what was initialised stays so.
void Checker::declare(const void* p, size_t bytes, bool initialised) {
  if (bytes == 0) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  std::map<uintptr_t, Range> older;
  for (auto it = ranges_.begin(); it != ranges_.end();) {
    const auto here = it++;
    if (here->first < end && begin < here->first + here->second.bytes) older.insert(ranges_.extract(here));
  }
  if (older.empty()) {
    ranges_[begin] = {bytes, initialised};
    return;
  }
  const uintptr_t declared = begin;
  for (const auto& [at, range] : older) {
    begin = std::min(begin, at);
    end = std::max(end, at + range.bytes);
  }
  Range merged{end - begin};
  merged.take({bytes, initialised}, declared - begin);
  for (const auto& [at, range] : older) merged.take(range, at - begin);
  ranges_[begin] = std::move(merged);
}

void Checker::forget(const void* p) { ranges_.erase(reinterpret_cast<uintptr_t>(p)); }

void Checker::forget_all() { ranges_.clear(); }

void Checker::initialise(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  auto it = ranges_.upper_bound(begin);
  if (it == ranges_.begin()) return;
  --it;
  const size_t from = begin - it->first, to = std::min(from + bytes, it->second.bytes);
  for (size_t i = from; i < to && !it->second.whole; ++i) it->second.set(i);
}

// ---------------------------------------------------------------------------------------------------------------------
// One access
// ---------------------------------------------------------------------------------------------------------------------

uint16_t Checker::site_index(void* site) {
  const auto found = site_of_.find(site);
  if (found != site_of_.end()) return found->second;
  const auto index = static_cast<uint16_t>(std::min<size_t>(sites_.size(), 65535));
  if (index == sites_.size()) sites_.push_back(site);
  return site_of_[site] = index;
}

Moment Checker::now(uint16_t site) const {
  const Thread& t = *machine().current;
  const uint16_t clock = blocks_.at(t.block->number).clocks.own(t.linear);
  return {t.block->number, t.epoch, static_cast<uint16_t>(t.linear), clock, t.grid_epoch, site};
}

bool Checker::happened_before(const Moment& a, const Moment& b) const {
  if (a.site == 0) return true;
  if (a.block != b.block) return a.grid < b.grid;
  if (a.thread == b.thread || a.epoch < b.epoch) return true;
  return blocks_.at(b.block).clocks.reached(b.thread, a.thread, a.clock);
}

std::string Checker::place(const Moment& moment) const {
  return "thread " + std::to_string(moment.thread) + " of block " + std::to_string(moment.block) + " at " +
         source_line(sites_[moment.site]);
}

void Checker::race(const char* what, const char* space, size_t address, const Moment& a, const Moment& b) const {
  fail("race: %s at %s address 0x%zx: %s, and %s, with no barrier between", what, space, address, place(a).c_str(),
       place(b).c_str());
}

void Checker::check_cell(Cell& cell, const Moment& moment, Access access, const char* space, size_t address) {
  if (cell.in_flight)
    fail("race: missing wait: %s address 0x%zx is the target of a cp.async that nobody has waited for (%s), %s", space,
         address, place(cell.write).c_str(), place(moment).c_str());
  const bool both_atomic = cell.atomic && access == Access::kAtomic;
  if (!both_atomic && !happened_before(cell.write, moment))
    race(access == Access::kRead ? "read after write" : "write after write", space, address, cell.write, moment);
  if (access == Access::kRead) {
    Moment& slot = happened_before(cell.reads[0], moment) ? cell.reads[0] : cell.reads[1];
    slot = moment;
    return;
  }
  for (Moment& read : cell.reads) {
    if (!happened_before(read, moment)) race("write after read", space, address, read, moment);
    read.site = 0;
  }
  cell.write = moment;
  cell.atomic = access == Access::kAtomic;
  cell.initialised = true;
}

void Checker::access_global(uintptr_t p, size_t bytes, Access access, const Moment& moment) {
  if (!ranges_.empty()) {
    auto it = ranges_.upper_bound(p);
    const bool before_all = it == ranges_.begin();
    if (!before_all) --it;
    if (before_all || p + bytes > it->first + it->second.bytes) {
      const long long past = before_all ? 0 : static_cast<long long>(p + bytes - it->first - it->second.bytes);
      fail("out of bounds: %zu bytes at %p in global memory, %lld past the end of an allocation of %zu, by %s", bytes,
           reinterpret_cast<void*>(p), past, before_all ? 0 : it->second.bytes, place(moment).c_str());
    }
    for (size_t i = p - it->first; i < p - it->first + bytes; ++i) {
      if (it->second.whole) break;
      if (access != Access::kWrite && !it->second.has(i))
        fail("uninitialised read: %p in global memory, by %s", reinterpret_cast<void*>(p), place(moment).c_str());
      it->second.set(i);
    }
  }
  constexpr uintptr_t kPage = 4096;
  for (uintptr_t at = p; at < p + bytes; ++at) {
    std::vector<Cell>& page = pages_[at / kPage];
    if (page.empty()) page.resize(kPage);
    check_cell(page[at % kPage], moment, access, "global", at);
  }
}

void Checker::access(const void* pointer, size_t bytes, Access access, void* site, bool aligned) {
  Machine& m = machine();
  if (m.current == nullptr) return;
  const auto p = reinterpret_cast<uintptr_t>(pointer);
  if (p >= m.stacks_begin && p < m.stacks_end) return;
  const auto closure = reinterpret_cast<uintptr_t>(m.launch->closure);
  if (p >= closure && p < closure + m.launch->closure_bytes) return;
  const Moment moment = now(site_index(site));
  if (aligned && bytes <= 16 && (bytes & (bytes - 1)) == 0 && p % bytes != 0)
    fail("misaligned: %zu bytes at %p, by %s", bytes, pointer, place(moment).c_str());
  emu::Block& block = *m.current->block;
  if (!block.holds(pointer)) {
    if (p >= reinterpret_cast<uintptr_t>(&__ehdr_start) && p < reinterpret_cast<uintptr_t>(&_end)) return;
    access_global(p, bytes, access, moment);
    if (counting) count(blocks_[block.number], p, bytes, moment, false, access != Access::kRead);
    return;
  }
  Block& shadow = blocks_[block.number];
  const size_t offset = p - reinterpret_cast<uintptr_t>(block.shared);
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (i >= shadow.allocated.size() || !shadow.allocated[i])
      fail("out of bounds: %zu bytes at shared address 0x%zx, by %s", bytes, offset, place(moment).c_str());
    Cell& cell = shadow.shared[i];
    if (access != Access::kWrite && !cell.initialised && !cell.in_flight)
      fail("uninitialised read: shared address 0x%zx, by %s", i, place(moment).c_str());
    check_cell(cell, moment, access, "shared", i);
  }
  if (counting) count(shadow, p, bytes, moment, true, access != Access::kRead);
}

void Checker::start_copy(const void* to, size_t bytes, void* site) {
  access(to, bytes, Access::kWrite, site, false);
  emu::Block& block = *machine().current->block;
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(to) - block.shared);
  for (size_t i = offset; i < offset + bytes; ++i) blocks_[block.number].shared[i].in_flight = true;
}

void Checker::finish_copy(const void* to, size_t bytes) {
  emu::Block& block = *machine().current->block;
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(to) - block.shared);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = blocks_[block.number].shared[i];
    cell.in_flight = false;
    cell.write = now(cell.write.site);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Coalescing and bank conflicts
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// A request packs an access: its width and lane beside its address.
unsigned packed(size_t bytes, unsigned lane, bool shared, bool write) {
  return static_cast<unsigned>(bytes) << 8 | lane << 2 | (shared ? 2u : 0u) | (write ? 1u : 0u);
}

uint64_t sectors(const std::vector<std::pair<uintptr_t, unsigned>>& request, uint64_t& ideal) {
  std::set<uintptr_t> found;
  std::set<std::pair<uintptr_t, unsigned>> distinct;
  uint64_t bytes = 0;
  for (const auto& [p, info] : request) {
    for (uintptr_t sector = p / 32; sector <= (p + (info >> 8) - 1) / 32; ++sector) found.insert(sector);
    if (distinct.insert({p, info >> 8}).second) bytes += info >> 8;
  }
  ideal = (bytes + 31) / 32;
  return found.size();
}

// Passes over the 32 banks: a pass serves one word per bank; wide accesses go by halves and quarters of the warp.
uint64_t bank_passes(const std::vector<std::pair<uintptr_t, unsigned>>& request, uint64_t& ideal) {
  size_t widest = 4;
  for (const auto& entry : request) widest = std::max<size_t>(widest, entry.second >> 8);
  const unsigned lanes = widest > 8 ? 8 : widest > 4 ? 16 : 32;
  std::map<unsigned, std::array<std::set<uintptr_t>, 32>> phases;
  for (const auto& [p, info] : request)
    for (uintptr_t word = p / 4; word <= (p + (info >> 8) - 1) / 4; ++word)
      phases[(info >> 2 & 31) / lanes][word % 32].insert(word);
  uint64_t passes = 0;
  for (const auto& [phase, banks] : phases) {
    size_t most = 0;
    for (const auto& words : banks) most = std::max(most, words.size());
    passes += most;
  }
  ideal = phases.size();
  return passes;
}

}  // namespace

void Checker::count(Block& block, uintptr_t p, size_t bytes, const Moment& moment, bool shared, bool write) {
  const Thread& t = *machine().current;
  const uint32_t nth = block.executions[t.linear][moment.site]++;
  const uint64_t key = uint64_t{nth} << 32 | uint64_t{moment.site} << 16 | t.position.warp;
  block.requests[key].push_back({p, packed(bytes, t.position.lane, shared, write)});
}

void Checker::settle(Block& block) {
  for (const auto& [key, request] : block.requests) {
    const bool shared = request.front().second & 2;
    Traffic& traffic = traffic_[{static_cast<uint16_t>(key >> 16), shared}];
    uint64_t ideal = 0;
    traffic.units += shared ? bank_passes(request, ideal) : sectors(request, ideal);
    traffic.ideal += ideal;
    ++traffic.requests;
  }
  block.requests.clear();
}

// One JSON object per line and instruction.
std::string Checker::report() const {
  std::string text;
  for (const auto& [key, traffic] : traffic_) {
    char line[512];
    snprintf(line, sizeof line,
             "{\"at\": \"%s\", \"space\": \"%s\", \"requests\": %llu, \"%s\": %llu, \"ideal\": %llu}\n",
             source_line(sites_[key.first]).c_str(), key.second ? "shared" : "global",
             static_cast<unsigned long long>(traffic.requests), key.second ? "passes" : "sectors",
             static_cast<unsigned long long>(traffic.units), static_cast<unsigned long long>(traffic.ideal));
    text += line;
  }
  return text;
}

}  // namespace emu
