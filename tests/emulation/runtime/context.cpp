#include "context.h"

#include <cstdint>

#if defined(EMULATION_UCONTEXT)

namespace emulation {

void prepare(Context* context, void* bottom, std::size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

void switch_context(Context* from, const Context* to) { swapcontext(from, to); }

}  // namespace emulation

#else

// The System V ABI: rbx, rbp and r12 to r15 belong to the caller. Kernels change neither the
// rounding mode nor other flags, so these are left as they are.
asm(R"(
.text
.p2align 4
.hidden emulation_switch_stacks
.globl emulation_switch_stacks
.type emulation_switch_stacks, @function
emulation_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stacks, . - emulation_switch_stacks
)");

extern "C" __attribute__((visibility("hidden"))) void emulation_switch_stacks(void** from,
                                                                              void* const* to);

namespace emulation {

// As emulation_switch_stacks leaves a stack: six registers, all 0, where to return to, and there,
// as after a call, 8 bytes below a multiple of 16.
void prepare(Context* context, void* bottom, std::size_t bytes, void (*entry)()) {
  constexpr std::uintptr_t kRegisters = 6;
  const std::uintptr_t top =
      (reinterpret_cast<std::uintptr_t>(bottom) + bytes) & ~std::uintptr_t{15};
  auto* const words = reinterpret_cast<std::uintptr_t*>(top) - (kRegisters + 2);
  for (std::uintptr_t i = 0; i < kRegisters; ++i) words[i] = 0;
  words[kRegisters] = reinterpret_cast<std::uintptr_t>(entry);
  words[kRegisters + 1] = 0;  // entry's return address, for those who walk up the stack
  *context = words;
}

void switch_context(Context* from, const Context* to) { emulation_switch_stacks(from, to); }

}  // namespace emulation

#endif
