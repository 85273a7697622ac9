// Where a stack's code goes on: on x86-64 by a few instructions of our own, elsewhere (or with
// EMULATION_UCONTEXT defined) by the C library, whose switches take a system call each.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif

#if defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(EMULATION_UCONTEXT)
using Context = ucontext_t;
#else
// The top of the stack that was left: the registers that a function must preserve lie there.
using Context = void*;
#endif

// The first switch to `context` calls `entry` on the stack bottom[0..bytes). It must not return.
void prepare(Context* context, void* bottom, std::size_t bytes, void (*entry)());

// Goes on at `to`; returns when somebody goes on at `from`.
void switch_context(Context* from, const Context* to);

}  // namespace emulation
