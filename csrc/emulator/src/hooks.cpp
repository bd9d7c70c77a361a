// The compiler's ThreadSanitizer instrumentation calls these at every load and store of a kernel built in "check" mode.
// They are ours: the sanitizer's own run time is not linked. In the other modes they do not exist.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "machine_state.h"

namespace emu {

std::string source_line(void* site) {
  Dl_info info;
  if (site == nullptr || !dladdr(site, &info)) return "?";
  const size_t offset = static_cast<char*>(site) - static_cast<char*>(info.dli_fbase) - 1;
  char command[1024], line[1024] = "";
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  // The innermost of the inlined calls that is not the emulator's.
  std::string found = "?";
  if (FILE* pipe = popen(command, "r")) {
    while (fgets(line, sizeof line, pipe) != nullptr) {
      const std::string text(line, strcspn(line, " \n"));
      found = text.substr(text.rfind('/') + 1);
      if (text.find("/emulator/include/") == std::string::npos) break;
    }
    pclose(pipe);
  }
  return found;
}

}  // namespace emu

#if defined(EMU_CHECK)
namespace emu {
namespace {

// Not for what the checker itself runs: templates that it shares with the kernels may be the instrumented copy.
void hook(const void* p, size_t bytes, Access access, void* site, bool aligned) {
  Machine& m = machine();
  if (m.current == nullptr || m.checking) return;
  m.checking = true;
  m.checker.access(p, bytes, access, site, aligned);
  m.checking = false;
}

}  // namespace
}  // namespace emu

using emu::Access;

#define HOOK(name, bytes, access, aligned) \
  void name(void* p) { emu::hook(p, bytes, Access::access, __builtin_return_address(0), aligned); }
#define HOOKS(bytes)                                        \
  HOOK(__tsan_read##bytes, bytes, kRead, true)              \
  HOOK(__tsan_write##bytes, bytes, kWrite, true)            \
  HOOK(__tsan_unaligned_read##bytes, bytes, kRead, false)   \
  HOOK(__tsan_unaligned_write##bytes, bytes, kWrite, false) \
  HOOK(__tsan_volatile_read##bytes, bytes, kAtomic, true)   \
  HOOK(__tsan_volatile_write##bytes, bytes, kAtomic, true)

#define ATOMICS(bits, T)                                                                                            \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_xor(volatile T* p, T v, int) { return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST); } \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {                          \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                         \
  }                                                                                                                 \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {                            \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
  }                                                                                                                 \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T e, T v, int, int) {                                 \
    __atomic_compare_exchange_n(p, &e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                               \
    return e;                                                                                                       \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { emu::hook(p, n, Access::kRead, __builtin_return_address(0), false); }
void __tsan_write_range(void* p, size_t n) { emu::hook(p, n, Access::kWrite, __builtin_return_address(0), false); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}
#endif
