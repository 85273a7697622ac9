// A stack, and on it a function that can be left and entered again.
#pragma once

#include "context.h"

namespace emulation {

// One fiber runs one function after another. All fibers are entered from, and leave to, the same
// place: the scheduler, on the stack of the operating system's thread.
class Fiber {
 public:
  using Body = void (*)();

  // Throws Failure if there are too many.
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The body starts with the next enter(). The one before must have returned.
  void start(Body body);
  // By the scheduler: runs the body until it leaves or returns.
  void enter();
  // By the body: back to the scheduler, until the next enter().
  void leave();

  // Before the first enter() on a thread of the operating system.
  static void attach_scheduler();

 private:
  static void run();
  void before_leaving(void** fake_stack);

  char* stack_;  // below it a page that nobody may touch: a stack that overflows ends the program
  char* top_;
  Context context_;
  Body body_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;
};

}  // namespace emulation
