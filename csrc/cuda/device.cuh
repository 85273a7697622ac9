// What a kernel asks of the device beyond arithmetic: shared memory, barriers among blocks, 16-byte
// accesses. Whatever a host compiler cannot know has its twin here (tests/emulation).
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/plan_cuda.h"

#ifdef __CUDACC__
// The emulation brings its own.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}
#endif

namespace batchnorm {
namespace cuda {

// ---- barriers -----------------------------------------------------------------------------------

// Thread-block clusters came with compute capability 9.0. Code for less, which may also run on
// newer devices, has no plan with one (Device::open), or gives an error rather than a wrong result.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
// For a thread that has written nothing for others: it does not wait for its stores.
__device__ inline void cluster_arrive_relaxed() { __cluster_barrier_arrive_relaxed(); }
__device__ inline void cluster_wait() { cooperative_groups::this_cluster().barrier_wait(); }
template <typename T>
__device__ T* in_block_of_cluster(T* shared, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
__device__ inline void cluster_arrive() { __trap(); }
__device__ inline void cluster_arrive_relaxed() { __trap(); }
__device__ inline void cluster_wait() { __trap(); }
template <typename T>
__device__ T* in_block_of_cluster(T* shared, unsigned) {
  __trap();
  return shared;
}
#endif

__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

// ---- accesses of 16 bytes -----------------------------------------------------------------------

#ifdef __CUDACC__
__device__ inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
// Written as one instruction, or the compiler makes four of it where it knows the words apart: each
// would touch every sector of the warp's memory.
__device__ inline void store_16(void* to, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ inline void store_16_streaming(void* to, uint4 value) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
// Begins to fetch what will be read soon, without a register to wait for it.
__device__ inline void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}
#else
// A device refuses an address that is no multiple of 16, and so does this. The copy keeps to the
// host's aliasing rules.
inline const void* aligned_16(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) __builtin_trap();
  return address;
}
inline uint4 load_16(const void* from) {
  uint4 value;
  __builtin_memcpy(&value, aligned_16(from), sizeof(value));
  return value;
}
inline void store_16(void* to, uint4 value) {
  __builtin_memcpy(const_cast<void*>(aligned_16(to)), &value, sizeof(value));
}
inline void store_16_streaming(void* to, uint4 value) { store_16(to, value); }
// Reads what it would fetch, so that it is seen if that doesn't exist.
inline void prefetch(const void* from) {
  static_cast<void>(*static_cast<const volatile unsigned char*>(from));
}
#endif

}  // namespace cuda
}  // namespace batchnorm
