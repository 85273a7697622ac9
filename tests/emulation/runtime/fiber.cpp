#include "fiber.h"

#include <sys/mman.h>

#include <string>

#include "emulation.h"
#include "sanitizers.h"

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 128 << 10;
// Stacks lie a power of two apart. If all began at the same offset, their hot ends would compete
// for the same few lines of the cache.
constexpr std::size_t kOffsets = 32, kOffsetStep = 128;
constexpr std::size_t kGuardBytes = 64 << 10;
// Each stack is two mappings, of which Linux allows 65530. ThreadSanitizer keeps more than a MiB
// for each thread it knows, and compares them all with each other.
constexpr std::size_t kLimit = 16 << 10, kTsanLimit = 4 << 10;

// The scheduler, as those it has switched to must know it. One launch runs at a time.
struct Scheduler {
  Context context;
  Fiber* entered = nullptr;
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};
Scheduler scheduler;

}  // namespace

Fiber::Fiber() {
  static std::size_t created = 0;  // and kept, for later launches
  const std::size_t limit = __tsan_create_fiber != nullptr ? kTsanLimit : kLimit;
  if (created == limit) {
    throw Failure("more than " + std::to_string(limit) +
                  " threads at a time: emulate a device with fewer multiprocessors");
  }
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    throw Failure("no memory for the stack of thread " + std::to_string(created));
  }
  stack_ = static_cast<char*>(memory) + kGuardBytes;
  top_ = stack_ + kStackBytes - created++ % kOffsets * kOffsetStep;
  if (__tsan_create_fiber != nullptr) tsan_fiber_ = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
  if (__tsan_destroy_fiber != nullptr) __tsan_destroy_fiber(tsan_fiber_);
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::start(Body body) {
  body_ = body;
  prepare(&context_, stack_, static_cast<std::size_t>(top_ - stack_), run);
}

// On the fiber's own stack.
void Fiber::run() {
  Fiber* const self = scheduler.entered;
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  }
  self->body_();
  self->before_leaving(nullptr);
  switch_context(&self->context_, &scheduler.context);
}

void Fiber::enter() {
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(tsan_fiber_, kSwitchOrdersNothing);
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, kStackBytes);
  }
  scheduler.entered = this;
  switch_context(&scheduler.context, &context_);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
  }
}

void Fiber::leave() {
  before_leaving(&fake_stack_);
  switch_context(&context_, &scheduler.context);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
  }
}

// Without a place to keep the fake stack, AddressSanitizer gives it up: the body has returned.
void Fiber::before_leaving(void** fake_stack) {
  if (__tsan_switch_to_fiber != nullptr) {
    __tsan_switch_to_fiber(scheduler.tsan_fiber, kSwitchOrdersNothing);
  }
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(fake_stack, scheduler.stack, scheduler.stack_bytes);
  }
}

void Fiber::attach_scheduler() {
  if (__tsan_get_current_fiber != nullptr) scheduler.tsan_fiber = __tsan_get_current_fiber();
}

}  // namespace emulation
