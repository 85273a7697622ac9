// Sums of a thread, and how two of them become one.
//
// Both passes carry two sums for each lane: Moments (mean and sum of squared deviations) and
// GradientSums (dz, and dz (x - center)). A lane is a column, or all elements (PlanesWalk).
#pragma once

#include "cuda/cell.cuh"

namespace batchnorm {
namespace cuda {

template <typename A, int kLanes>
struct Partial {
  A first[kLanes], second[kLanes];
  A count;  // elements of each lane

  __device__ Partial() : count(0) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) first[l] = second[l] = A(0);
  }
};

// Chan, Golub & LeVeque (1979): exact in exact arithmetic, without cancellation.
struct Moments {
  template <typename A, int kLanes>
  __device__ static void merge(Partial<A, kLanes>* into, const Partial<A, kLanes>& other) {
    if (other.count == A(0)) return;
    if (into->count == A(0)) {  // besides: an infinite delta * delta times a weight of 0 is nan
      *into = other;
      return;
    }
    const A count = into->count + other.count;
    const A share = other.count / count;
    const A weight = into->count * share;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      const A delta = other.first[l] - into->first[l];
      into->first[l] = fma_of(delta, share, into->first[l]);
      into->second[l] += fma_of(delta * delta, weight, other.second[l]);
    }
    into->count = count;
  }

  // Adds kCells cells of values, of each the first `valid`: the mean of the few, then their squared
  // deviations from it, exactly as defined; they are in registers anyway.
  template <int kCells, typename A, int kLanes>
  __device__ static void add(Partial<A, kLanes>* into, const Values<A> (&x)[kCells], int valid) {
    Partial<A, kLanes> chunk;
    chunk.count = kLanes == 1 ? A(kCells * valid) : A(kCells);
    const A each = A(1) / chunk.count;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
#pragma unroll
      for (int e = 0; e < kCellElements; ++e) {
        if (e < valid) chunk.first[kLanes == 1 ? 0 : e] += x[i].value[e];
      }
    }
#pragma unroll
    for (int l = 0; l < kLanes; ++l) chunk.first[l] *= each;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
#pragma unroll
      for (int e = 0; e < kCellElements; ++e) {
        const int l = kLanes == 1 ? 0 : e;
        const A deviation = x[i].value[e] - chunk.first[l];
        if (e < valid) chunk.second[l] = fma_of(deviation, deviation, chunk.second[l]);
      }
    }
    merge(into, chunk);
  }
};

struct GradientSums {
  template <typename A, int kLanes>
  __device__ static void merge(Partial<A, kLanes>* into, const Partial<A, kLanes>& other) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      into->first[l] += other.first[l];
      into->second[l] += other.second[l];
    }
  }

  // Of one cell: dz and centered = x - center of the first `valid` elements. Where they all go into
  // one sum, they are added to each other first: fewer roundings of a large sum.
  template <typename A, int kLanes>
  __device__ static void add(Partial<A, kLanes>* into, const Values<A>& dz,
                             const Values<A>& centered, int valid) {
    A sum = A(0), dot = A(0);
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      A* const to_sum = kLanes == 1 ? &sum : &into->first[kLanes == 1 ? 0 : e];
      A* const to_dot = kLanes == 1 ? &dot : &into->second[kLanes == 1 ? 0 : e];
      if (e < valid) {
        *to_sum += dz.value[e];
        *to_dot = fma_of(dz.value[e], centered.value[e], *to_dot);
      }
    }
    if constexpr (kLanes == 1) {
      into->first[0] += sum;
      into->second[0] += dot;
    }
  }
};

}  // namespace cuda
}  // namespace batchnorm
