// What AddressSanitizer and ThreadSanitizer must be told about fibers and shared memory.
//
// The runtime itself is compiled without a sanitizer, in every flavour: its own bookkeeping is
// shared by all fibers and would look like races. So these functions are weak references, null in a
// program that no sanitizer is linked into.
#pragma once

#include <cstddef>

extern "C" {
#define EMULATION_WEAK __attribute__((weak))
EMULATION_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                   std::size_t bytes);
EMULATION_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                    std::size_t* bytes);
EMULATION_WEAK void __asan_poison_memory_region(const volatile void* address, std::size_t bytes);
EMULATION_WEAK void* __tsan_get_current_fiber();
EMULATION_WEAK void* __tsan_create_fiber(unsigned flags);
EMULATION_WEAK void __tsan_destroy_fiber(void* fiber);
EMULATION_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
EMULATION_WEAK void __tsan_acquire(void* address);
EMULATION_WEAK void __tsan_release(void* address);
EMULATION_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
EMULATION_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef EMULATION_WEAK
}

namespace emulation {

// ThreadSanitizer takes a switch of fibers for a synchronisation of the two unless told otherwise.
constexpr unsigned kSwitchOrdersNothing = 1;

// What ThreadSanitizer orders memory by: who acquires it has seen what came before each release.
class Order {
 public:
  void acquire() {
    if (__tsan_acquire != nullptr) __tsan_acquire(&address_);
  }
  void release() {
    if (__tsan_release != nullptr) __tsan_release(&address_);
  }

 private:
  char address_ = 0;
};

// While it lives, ThreadSanitizer ignores what the running fiber does to memory. For the runtime's
// calls of malloc, free and memset, which it would otherwise see.
class Unseen {
 public:
  Unseen() {
    if (AnnotateIgnoreWritesBegin != nullptr) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (AnnotateIgnoreWritesEnd != nullptr) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

}  // namespace emulation
