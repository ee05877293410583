// Fibers for the CUDA emulator: a switch of stacks in a dozen instructions (x86-64 and AArch64;
// other machines take the twenty times slower ucontext), announced to AddressSanitizer where that
// is on.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emu {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr bool kAddressSanitizer = false;
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Fiber {
  void* stack_pointer = nullptr;  // while it is not running
  void* stack = nullptr;          // lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if !defined(__x86_64__) && !defined(__aarch64__)
  ucontext_t context;
#endif
};

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer of one fiber and takes up those of
// another.
extern "C" void cuda_emu_switch(void** save, void* load);
asm(R"(
  .text
  .p2align 4
  .weak cuda_emu_switch
  .hidden cuda_emu_switch
  .type cuda_emu_switch, @function
cuda_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_emu_switch, .-cuda_emu_switch
)");
constexpr int kSavedWords = 6, kReturnWord = 6, kFrameWords = 8;
#elif defined(__aarch64__)
extern "C" void cuda_emu_switch(void** save, void* load);
asm(R"(
  .text
  .p2align 4
  .weak cuda_emu_switch
  .hidden cuda_emu_switch
  .type cuda_emu_switch, %function
cuda_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size cuda_emu_switch, .-cuda_emu_switch
)");
constexpr int kReturnWord = 11, kFrameWords = 20;
#endif

// Makes `fiber` start in `main` when it is next switched to; its stack is kept between starts.
inline void start_fiber(Fiber& fiber, void (*main)()) {
  if (!fiber.stack) {
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) abort();
    fiber.stack_bytes = kStackBytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.stack_bytes);
#endif
  fiber.fake_stack = nullptr;
#if defined(__x86_64__) || defined(__aarch64__)
  uintptr_t* frame =
      reinterpret_cast<uintptr_t*>(static_cast<char*>(fiber.stack) + kStackBytes) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = 0;
  frame[kReturnWord] = reinterpret_cast<uintptr_t>(main);
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, main, 0);
#endif
}

// The first thing a fiber does: `from` is the fiber that it was started from.
inline void enter_fiber([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.stack_bytes);
  from.stack = const_cast<void*>(stack);
#endif
}

// Runs `to` until it switches back to `from`, which never happens if `from` is `finished`.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  cuda_emu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace cuda_emu
