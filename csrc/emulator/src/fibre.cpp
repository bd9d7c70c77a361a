#include "fibre.h"

#if defined(EMU_ASAN)
// What a kernel's failed launch leaves behind is no leak of the program's.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace emu {

Fibre* Fibre::from_ = nullptr;

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* load);
// The registers that a callee keeps, and the stack; nothing else survives a call.
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, @function
emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emu_switch, .-emu_switch
)");
#endif

void Fibre::start(unsigned char* stack, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = kStackBytes;
#if defined(__x86_64__)
  // After the return into `entry` the stack must be 8 past a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 3;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
#if defined(EMU_ASAN)
  fake_stack_ = nullptr;
#endif
#if defined(EMU_TSAN)
  if (tsan_ == nullptr) tsan_ = __tsan_create_fiber(0);
#endif
}

void Fibre::switch_to(Fibre& to, [[maybe_unused]] bool for_ever) {
  from_ = this;
#if defined(EMU_TSAN)
  if (tsan_ == nullptr) tsan_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(__x86_64__)
  emu_switch(&stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&context_, &to.context_);
#endif
  arrived();
}

void Fibre::arrived() {
#if defined(EMU_ASAN)
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &stack, &bytes);
  if (from_->stack_ == nullptr) {  // the thread that launches: its own stack is known from here on
    from_->stack_ = stack;
    from_->stack_bytes_ = bytes;
  }
#endif
}

void Fibre::release() {
#if defined(EMU_TSAN)
  if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
  tsan_ = nullptr;
#endif
}

}  // namespace emu
