// Fibres: a stack and a place to continue at. AddressSanitizer and ThreadSanitizer are told about every switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__) || defined(EMU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

class Fibre {
 public:
  static constexpr size_t kStackBytes =
#if defined(EMU_ASAN) || defined(EMU_TSAN)
      256 << 10;
#else
      64 << 10;
#endif

  // `entry` runs at the first switch and must never return: its last act is a switch elsewhere.
  void start(unsigned char* stack, void (*entry)());
  // Continues `to`; returns when somebody switches back here.
  void switch_to(Fibre& to, bool for_ever = false);
  // The first thing in a new fibre.
  void arrived();
  void release();

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(EMU_ASAN)
  void* fake_stack_ = nullptr;
#endif
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
#if defined(EMU_TSAN)
  void* tsan_ = nullptr;
#endif
  static Fibre* from_;
};

}  // namespace emu
