// Per-channel values (weight, bias, running statistics) in whatever dtype they have, and what the
// second pass makes of them.
#pragma once

#include "core/calls.h"
#include "cuda/geometry.cuh"

namespace batchnorm {
namespace cuda {

__device__ inline void prefetch(const ChannelValues& values, std::int64_t channel) {
  if (!values.data) return;
  prefetch(static_cast<const char*>(values.data) + channel * values.stride * size_of(values.dtype));
}

// A value as it lies in memory. Several are on their way at once, as long as none is widened.
struct RawValue {
  std::uint64_t bits;
};
__device__ inline RawValue load_raw(const ChannelValues& values, std::int64_t channel) {
  if (!values.data) return {0};
  const std::int64_t at = channel * values.stride;
  switch (values.dtype) {
    case DType::kFloat:
      return {__float_as_uint(static_cast<const float*>(values.data)[at])};
    case DType::kDouble:
      return {static_cast<std::uint64_t>(
          __double_as_longlong(static_cast<const double*>(values.data)[at]))};
    case DType::kBFloat16:
      return {static_cast<const BFloat16*>(values.data)[at].bits};
    default:
      return {static_cast<const Half*>(values.data)[at].bits};
  }
}
__device__ inline double widen(const ChannelValues& values, RawValue raw, double otherwise) {
  if (!values.data) return otherwise;
  switch (values.dtype) {
    case DType::kFloat:
      return __uint_as_float(static_cast<unsigned>(raw.bits));
    case DType::kDouble:
      return __longlong_as_double(static_cast<long long>(raw.bits));
    case DType::kBFloat16:
      return widen(BFloat16{static_cast<std::uint16_t>(raw.bits)});
    default:
      return widen(Half{static_cast<std::uint16_t>(raw.bits)});
  }
}
__device__ inline double load_value(const ChannelValues& values, std::int64_t channel,
                                    double otherwise) {
  return widen(values, load_raw(values, channel), otherwise);
}

__device__ inline void store_value(const ChannelValues& values, std::int64_t channel,
                                   double value) {
  if (!values.data) return;
  const std::int64_t at = channel * values.stride;
  switch (values.dtype) {
    case DType::kFloat:
      static_cast<float*>(values.data)[at] = static_cast<float>(value);
      return;
    case DType::kDouble:
      static_cast<double*>(values.data)[at] = value;
      return;
    case DType::kBFloat16:  // not by way of float, which would round twice
      static_cast<BFloat16*>(values.data)[at].bits = __nv_bfloat16_raw(__double2bfloat16(value)).x;
      return;
    default:
      static_cast<Half*>(values.data)[at].bits = __half_raw(__double2half(value)).x;
  }
}

__device__ inline double moved(double before, double batch, double momentum) {
  return (1 - momentum) * before + momentum * batch;
}

__device__ inline void move(const RunningStatistics& running, std::int64_t c,
                            const batchnorm::Moments& batch, double momentum) {
  if (!running.are_moved_by(batch)) return;
  const RawValue mean = load_raw(running.mean, c), var = load_raw(running.var, c);
  store_value(running.mean, c, moved(widen(running.mean, mean, 0), batch.mean, momentum));
  if (batch.count <= 1) return;
  const double variance = batch.m2 / (batch.count - 1);
  store_value(running.var, c, moved(widen(running.var, var, 0), variance, momentum));
}

// What a batch weighs that is yet to be counted, or was already.
__device__ inline double momentum_of(const RunningStatistics& running, bool yet_to_be_counted) {
  if (!running.cumulative_average || !running.num_batches_tracked) return running.momentum;
  return 1.0 / static_cast<double>(*running.num_batches_tracked + (yet_to_be_counted ? 1 : 0));
}

// z = (x - center) * scale + shift. The mean's rounding error goes into shift, so that x - center
// loses no digits.
template <typename A>
__device__ void write_affine(A* finals, double mean, double invstd, double weight, double bias) {
  const double slope = weight * invstd;
  const A center = static_cast<A>(mean);
  finals[0] = center;
  finals[1] = static_cast<A>(slope);
  finals[2] = static_cast<A>(bias + (static_cast<double>(center) - mean) * slope);
}

// center, scale and shift of the thread's lanes: [channels][kFinalValues] in shared memory ->
// registers.
template <typename A, typename WalkType>
__device__ void load_finals(const WalkType& walk, const A* finals, A (&to)[3][WalkType::kLanes]) {
#pragma unroll
  for (int l = 0; l < WalkType::kLanes; ++l) {
    const A* const of_channel = finals + walk.channel_of(l) * kFinalValues;
#pragma unroll
    for (int i = 0; i < 3; ++i) to[i][l] = of_channel[i];
  }
}

template <typename A, int kLanes>
struct Affine {
  A values[3][kLanes];  // center, scale, shift

  __device__ Values<A> centered(const Values<A>& x) const {
    Values<A> result;
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      result.value[e] = x.value[e] - values[0][kLanes == 1 ? 0 : e];
    }
    return result;
  }
  __device__ A scale(int e) const { return values[1][kLanes == 1 ? 0 : e]; }

  // z as the forward pass has it, to the last bit: the one place where it is computed. (A pointer
  // that may be null would move the residual from registers to memory.)
  template <typename T>
  __device__ Values<A> z(const Values<A>& centered, bool has_residual,
                         const Cell<T>& residual) const {
    Values<A> result;
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      const A shift = values[2][kLanes == 1 ? 0 : e];
      result.value[e] = fma_of(centered.value[e], scale(e), shift);
      if (has_residual) result.value[e] += widen(residual.element[e]);
    }
    return result;
  }
};

// Elements of a pass that a thread has on their way at once, by the size of their type: 64 bytes
// for a multiprocessor with 512 threads keep 32 KB on their way, more than the 25 KB that 36 bytes
// a nanosecond (4.8 TB/s over 132 multiprocessors) need at 700 ns.
template <typename T, Access kAccess, int kTensors>
constexpr int kCellsAtOnce =
    kAccess == Access::kScalar || 8 * sizeof(T) * kTensors >= 64 ? 1
                                                                 : 64 / (8 * sizeof(T) * kTensors);

// Registers: 128 for each thread where two blocks share a multiprocessor.
template <typename T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 1 : 2;

}  // namespace cuda
}  // namespace batchnorm
