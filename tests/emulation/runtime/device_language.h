// CUDA's built-in variables, barriers, warp collectives, atomics and cache hints, as C++20 for the
// host. Every function takes the place of its caller along, for the error messages and to tell two
// barriers apart.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <atomic>
#include <cstddef>
#include <source_location>
#include <type_traits>

// CUDA's headers define it as nothing for a host compiler: every thread would get its own copy.
#undef __shared__
#define __shared__ _Pragma("GCC error \"use block_shared<T>() or dynamic_shared<T>()\"")
#undef __launch_bounds__
#define __launch_bounds__(...)

// The running thread's. All CUDA threads of a launch share one thread of the operating system.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

using Place = std::source_location;

inline unsigned thread_rank_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
inline int lane() { return static_cast<int>(thread_rank_in_block() % warpSize); }

void block_barrier(Place place);
void grid_barrier(Place place);
void cluster_arrive(Place place, bool is_relaxed = false);
void cluster_wait(Place place);
bool is_cooperative();
unsigned block_rank_in_cluster();
unsigned blocks_in_cluster();

// A barrier among the warp's lanes in the mask.
void warp_barrier(unsigned mask, Place place);

// Gives the calling lane the value of another. Where that lane is not in the mask, has returned or
// does not exist, the result's bytes are 0xff: NaN, or -1.
void shuffle(unsigned mask, int source, const void* value, void* result, std::size_t bytes,
             Place place);
unsigned ballot(unsigned mask, bool predicate, Place place);

void fence();
// Somewhere else may a thread run now. Whatever polls memory must call this (every atomic does).
void yield();

// The running block's object with this key. All bytes are 0xff at first: NaN in every format.
void* static_shared(const void* key, std::size_t bytes, std::size_t alignment);
void* dynamic_shared_memory();
void* map_shared_rank(const void* address, unsigned rank);

template <typename T>
inline constexpr char kSharedKey{};

template <typename T>
T shuffle_from(unsigned mask, int source, const T& value, Place place) {
  static_assert(std::is_trivially_copyable_v<T>);
  T result;
  shuffle(mask, source, &value, &result, sizeof(T), place);
  return result;
}

}  // namespace emulation

// ---- shared memory ------------------------------------------------------------------------------

template <typename T>
T& block_shared() {
  return *static_cast<T*>(
      emulation::static_shared(&emulation::kSharedKey<T>, sizeof(T), alignof(T)));
}
template <typename T>
T* dynamic_shared() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16 bytes");
  return static_cast<T*>(emulation::dynamic_shared_memory());
}

// ---- barriers and fences ------------------------------------------------------------------------

inline void __syncthreads(emulation::Place place = emulation::Place::current()) {
  emulation::block_barrier(place);
}
inline void __syncwarp(unsigned mask = ~0u, emulation::Place place = emulation::Place::current()) {
  emulation::warp_barrier(mask, place);
}
inline void __cluster_barrier_arrive_relaxed(emulation::Place place = emulation::Place::current()) {
  emulation::cluster_arrive(place, true);
}
inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }
inline void __nanosleep(unsigned) { emulation::yield(); }

// ---- warp collectives ---------------------------------------------------------------------------

// "width" cuts the warp into segments, in which a lane that would be read past the end gives the
// caller its own value: the rules of the CUDA C++ Programming Guide, "Warp Shuffle Functions".
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulation::Place place = emulation::Place::current()) {
  const int first = emulation::lane() / width * width;
  return emulation::shuffle_from(mask, first + (source & (width - 1)), value, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulation::Place place = emulation::Place::current()) {
  const int lane = emulation::lane();
  const int source = lane ^ lane_mask;
  const bool within = source < (lane / width + 1) * width;
  return emulation::shuffle_from(mask, within ? source : lane, value, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulation::Place place = emulation::Place::current()) {
  const int lane = emulation::lane();
  const bool within = lane % width + delta < static_cast<unsigned>(width);
  const int source = within ? lane + static_cast<int>(delta) : lane;
  return emulation::shuffle_from(mask, source, value, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulation::Place place = emulation::Place::current()) {
  const int lane = emulation::lane();
  const bool within = static_cast<unsigned>(lane % width) >= delta;
  const int source = within ? lane - static_cast<int>(delta) : lane;
  return emulation::shuffle_from(mask, source, value, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Place place = emulation::Place::current()) {
  return emulation::ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulation::Place place = emulation::Place::current()) {
  return emulation::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulation::Place place = emulation::Place::current()) {
  return emulation::ballot(mask, predicate == 0, place) == 0;
}

// ---- atomics ------------------------------------------------------------------------------------

// CUDA's are relaxed. Those that are missing here are missing on purpose: sums of floating-point
// numbers would depend on the order of the threads.
namespace emulation {
template <typename T>
constexpr bool is_atomic =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <typename T>
std::atomic_ref<T> atomic(T* address) {
  static_assert(is_atomic<T>, "int, unsigned or unsigned long long");
  yield();
  return std::atomic_ref<T>(*address);
}
}  // namespace emulation

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulation::atomic(address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulation::atomic(address).fetch_or(value, std::memory_order_relaxed);
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulation::atomic(address).exchange(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  emulation::atomic(address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}

// ---- loads and stores with a cache hint ---------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldca(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldlu(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stwb(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stwt(T* address, std::type_identity_t<T> value) {
  *address = value;
}
