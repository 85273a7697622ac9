// A cell: 8 neighbouring elements as they are stored, and their values in the accumulate type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/types.h"
#include "cuda/device.cuh"

namespace batchnorm {
namespace cuda {

// ---- one element, and two at a time -------------------------------------------------------------

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ inline float widen(Half value) { return __half2float(__half(__half_raw{value.bits})); }

__device__ inline void narrow(float a, float b, float* to) { to[0] = a, to[1] = b; }
__device__ inline void narrow(double a, double b, double* to) { to[0] = a, to[1] = b; }
__device__ inline void narrow(float a, float b, BFloat16* to) {
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(a, b);
  to[0].bits = pair.x, to[1].bits = pair.y;
}
__device__ inline void narrow(float a, float b, Half* to) {
  const __half2_raw pair = __floats2half2_rn(a, b);
  to[0].bits = pair.x, to[1].bits = pair.y;
}

// Rounded as it would be stored.
template <typename T>
__device__ Accumulate<T> round_to(Accumulate<T> value) {
  T stored[2];
  narrow(value, value, stored);
  return widen(stored[0]);
}

// ---- cells --------------------------------------------------------------------------------------

template <typename T>
struct alignas(16) Cell {
  static constexpr int kWords = kCellElements * sizeof(T) / 16;  // of 16 bytes
  T element[kCellElements];

  __device__ uint4 word(int i) const {
    uint4 result;
    __builtin_memcpy(&result, element + i * (16 / sizeof(T)), 16);
    return result;
  }
  __device__ void set_word(int i, uint4 value) {
    __builtin_memcpy(element + i * (16 / sizeof(T)), &value, 16);
  }
};

template <typename A>
struct Values {
  A value[kCellElements];
};

template <typename T>
__device__ Values<Accumulate<T>> widen(const Cell<T>& cell) {
  Values<Accumulate<T>> result;
#pragma unroll
  for (int e = 0; e < kCellElements; ++e) result.value[e] = widen(cell.element[e]);
  return result;
}

template <typename T>
__device__ Cell<T> narrow(const Values<Accumulate<T>>& values) {
  Cell<T> cell;
#pragma unroll
  for (int e = 0; e < kCellElements; e += 2) {
    narrow(values.value[e], values.value[e + 1], cell.element + e);
  }
  return cell;
}

// from: the cell's first element. What lies beyond `valid` elements is not touched, and reads as 0.
template <Access kAccess, typename T>
__device__ Cell<T> load(const T* from, int valid) {
  Cell<T> cell;
  if constexpr (kAccess == Access::kVector) {
#pragma unroll
    for (int i = 0; i < Cell<T>::kWords; ++i) {
      cell.set_word(i, load_16(from + i * (16 / sizeof(T))));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) cell.element[e] = e < valid ? from[e] : T{};
  }
  return cell;
}

template <Access kAccess, typename T>
__device__ void store(T* to, const Cell<T>& cell, int valid, bool streaming) {
  if constexpr (kAccess == Access::kVector) {
#pragma unroll
    for (int i = 0; i < Cell<T>::kWords; ++i) {
      T* const at = to + i * (16 / sizeof(T));
      if (streaming) {
        store_16_streaming(at, cell.word(i));
      } else {
        store_16(at, cell.word(i));
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      if (e < valid) to[e] = cell.element[e];
    }
  }
}

// ---- cells that stay in shared memory -----------------------------------------------------------

// Each thread has slots of its own, so that no barrier is needed between writing and reading them.
// Neighbouring threads' words lie side by side: no bank conflicts.
template <typename T, int kTensors>
class Slots {
 public:
  __device__ Slots(void* shared, int count)
      : words_(static_cast<uint4*>(shared) + threadIdx.x), count_(count) {}

  __device__ bool holds(int cell) const { return cell < count_; }
  __device__ void put(int cell, int tensor, const Cell<T>& value) const {
#pragma unroll
    for (int i = 0; i < Cell<T>::kWords; ++i) *word(cell, tensor, i) = value.word(i);
  }
  __device__ Cell<T> get(int cell, int tensor) const {
    Cell<T> value;
#pragma unroll
    for (int i = 0; i < Cell<T>::kWords; ++i) value.set_word(i, *word(cell, tensor, i));
    return value;
  }
  __device__ static std::int64_t bytes(int count) {
    return static_cast<std::int64_t>(count) * kTensors * Cell<T>::kWords * kCudaThreads * 16;
  }

 private:
  __device__ uint4* word(int cell, int tensor, int i) const {
    return words_ + ((cell * kTensors + tensor) * Cell<T>::kWords + i) * kCudaThreads;
  }

  uint4* words_;
  int count_;
};

}  // namespace cuda
}  // namespace batchnorm
