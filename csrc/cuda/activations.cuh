// The activations: value, and gradient with respect to z. Formulas are those of
// torch.nn.functional.
#pragma once

#include "core/activation.h"
#include "cuda/cell.cuh"

namespace batchnorm {
namespace cuda {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline double expm1_of(double x) { return expm1(x); }
__device__ inline float erfc_of(float x) { return erfcf(x); }
__device__ inline double erfc_of(double x) { return erfc(x); }
__device__ inline float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fma_of(double a, double b, double c) { return fma(a, b, c); }

template <typename A>
__device__ A sigmoid(A z) {
  return A(1) / (A(1) + exp_of(-z));
}
template <typename A>
__device__ A normal_cdf(A z) {
  return A(0.5) * erfc_of(z * A(-0.70710678118654752440));
}
// 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3).
constexpr double kTwiceRoot = 1.59576912160573071176;  // 2 sqrt(2 / pi)
template <typename A>
__device__ A tanh_gate(A z) {
  return sigmoid(z * fma_of(z * z, A(kTwiceRoot * 0.044715), A(kTwiceRoot)));
}

// ---- piecewise-linear ones (and none): where they drop an element the derivative is not 1
// --------

template <typename A>
__device__ bool drops(Activation activation, A z) {
  switch (activation) {
    case Activation::kRelu:
      return z <= A(0);
    case Activation::kRelu6:
      return z <= A(0) || z >= A(6);
    case Activation::kLeakyRelu:
      return !(z > A(0));  // nan too
    default:
      return false;
  }
}

template <typename A>
__device__ A linear_value(Activation activation, A z, A param) {
  switch (activation) {
    case Activation::kRelu:
      return z <= A(0) ? A(0) : z;
    case Activation::kRelu6:
      return z <= A(0) ? A(0) : z >= A(6) ? A(6) : z;
    case Activation::kLeakyRelu:
      return z > A(0) ? z : z * param;
    default:
      return z;
  }
}

// ---- smooth ones --------------------------------------------------------------------------------

template <typename A>
__device__ A smooth_value(Activation activation, A z, A param) {
  switch (activation) {
    case Activation::kElu:
      return z > A(0) ? z : param * expm1_of(z);
    case Activation::kSilu:
      return z / (A(1) + exp_of(-z));
    case Activation::kGelu:
      return z * normal_cdf(z);
    case Activation::kGeluTanh:
      return z * tanh_gate(z);
    default:  // hardswish
      return z <= A(-3) ? z * A(0) : z >= A(3) ? z : z * (z + A(3)) / A(6);
  }
}

template <typename A>
__device__ A smooth_derivative(Activation activation, A any, A param) {
  switch (activation) {
    case Activation::kElu:
      return any > A(0) ? A(1) : param * exp_of(any);
    case Activation::kSilu: {
      const A s = sigmoid(any);
      return s * fma_of(any, A(1) - s, A(1));
    }
    case Activation::kGelu:
      return fma_of(any, A(0.39894228040143267794) * exp_of(any * any * A(-0.5)), normal_cdf(any));
    case Activation::kGeluTanh: {
      // Beyond 64 it is 0 or 1, and z^2 could overflow.
      const A z = any < A(-64) ? A(-64) : any > A(64) ? A(64) : any;
      const A s = tanh_gate(z);
      const A slope = fma_of(z * z, A(kTwiceRoot * 3 * 0.044715), A(kTwiceRoot));
      return fma_of(z * s * (A(1) - s), slope, s);
    }
    default:  // hardswish
      return any <= A(-3) ? A(0) : any >= A(3) ? A(1) : any / A(3) + A(0.5);
  }
}

// ---- of a cell ----------------------------------------------------------------------------------

// y = act(z). Piecewise-linear activations see z rounded to the storage dtype, as a separate one
// would. *kept: a bit for each element that is not dropped (kSmooth: unused).
template <typename T, bool kSmooth>
__device__ Values<Accumulate<T>> activate(Activation activation, const Values<Accumulate<T>>& z,
                                          Accumulate<T> param, unsigned* kept) {
  Values<Accumulate<T>> y;
  *kept = 0;
#pragma unroll
  for (int e = 0; e < kCellElements; ++e) {
    if constexpr (kSmooth) {
      y.value[e] = smooth_value(activation, z.value[e], param);
    } else if (activation == Activation::kIdentity) {
      y.value[e] = z.value[e];
    } else {
      const Accumulate<T> rounded = round_to<T>(z.value[e]);
      y.value[e] = linear_value(activation, rounded, param);
      *kept |= static_cast<unsigned>(!drops(activation, rounded)) << e;
    }
  }
  return y;
}

// dz = dy where the mask says that the element was kept.
template <typename A>
__device__ Values<A> masked_gradient(Activation activation, const Values<A>& dy, unsigned kept,
                                     A param) {
  const bool leaky = activation == Activation::kLeakyRelu;
  Values<A> dz;
#pragma unroll
  for (int e = 0; e < kCellElements; ++e) {
    const A dropped = leaky ? dy.value[e] * param : A(0);
    dz.value[e] = (kept >> e & 1u) != 0 ? dy.value[e] : dropped;
  }
  return dz;
}

// dz = dy act'(z), z as the forward pass had it.
template <typename T, bool kSmooth>
__device__ Values<Accumulate<T>> activation_gradient(Activation activation,
                                                     const Values<Accumulate<T>>& dy,
                                                     const Values<Accumulate<T>>& z,
                                                     Accumulate<T> param) {
  if constexpr (kSmooth) {
    Values<Accumulate<T>> dz;
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      dz.value[e] = dy.value[e] * smooth_derivative(activation, z.value[e], param);
    }
    return dz;
  } else {
    if (activation == Activation::kIdentity) return dy;
    unsigned kept = 0;
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      kept |= static_cast<unsigned>(!drops(activation, round_to<T>(z.value[e]))) << e;
    }
    return masked_gradient(activation, dy, kept, param);
  }
}

}  // namespace cuda
}  // namespace batchnorm
