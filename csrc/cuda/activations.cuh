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

// ---- of one element -----------------------------------------------------------------------------

struct Elu {
  template <typename A>
  __device__ static A value(A z, A alpha) {
    return z > A(0) ? z : alpha * expm1_of(z);
  }
  template <typename A>
  __device__ static A derivative(A z, A alpha) {
    return z > A(0) ? A(1) : alpha * exp_of(z);
  }
};

struct Silu {
  template <typename A>
  __device__ static A value(A z, A) {
    return z / (A(1) + exp_of(-z));
  }
  template <typename A>
  __device__ static A derivative(A z, A) {
    const A s = sigmoid(z);
    return s * fma_of(z, A(1) - s, A(1));
  }
};

struct Gelu {
  template <typename A>
  __device__ static A value(A z, A) {
    return z * normal_cdf(z);
  }
  template <typename A>
  __device__ static A derivative(A z, A) {
    return fma_of(z, A(0.39894228040143267794) * exp_of(z * z * A(-0.5)), normal_cdf(z));
  }
};

struct GeluTanh {
  template <typename A>
  __device__ static A value(A z, A) {
    return z * tanh_gate(z);
  }
  template <typename A>
  __device__ static A derivative(A any, A) {
    // Beyond 64 it is 0 or 1, and z^2 could overflow.
    const A z = any < A(-64) ? A(-64) : any > A(64) ? A(64) : any;
    const A s = tanh_gate(z);
    const A slope = fma_of(z * z, A(kTwiceRoot * 3 * 0.044715), A(kTwiceRoot));
    return fma_of(z * s * (A(1) - s), slope, s);
  }
};

struct Hardswish {
  template <typename A>
  __device__ static A value(A z, A) {
    return z <= A(-3) ? z * A(0) : z >= A(3) ? z : z * (z + A(3)) / A(6);
  }
  template <typename A>
  __device__ static A derivative(A z, A) {
    return z <= A(-3) ? A(0) : z >= A(3) ? A(1) : z / A(3) + A(0.5);
  }
};

// The piecewise-linear ones see z rounded to the storage dtype, as a separate activation would.
// drops(z) says where the derivative is not 1.
struct Relu {
  template <typename A>
  __device__ static bool drops(A z) {
    return z <= A(0);
  }
};
struct Relu6 {
  template <typename A>
  __device__ static bool drops(A z) {
    return z <= A(0) || z >= A(6);
  }
};
struct LeakyRelu {
  template <typename A>
  __device__ static bool drops(A z) {
    return !(z > A(0));  // nan too
  }
};

// ---- of a cell: one decision for 8 elements -----------------------------------------------------

template <typename A, typename Function>
__device__ Values<A> each(const Values<A>& values, const Function& function) {
  Values<A> result;
#pragma unroll
  for (int e = 0; e < kCellElements; ++e) result.value[e] = function(values.value[e], e);
  return result;
}

template <typename Act, typename A>
__device__ Values<A> smooth_values(const Values<A>& z, A param) {
  return each(z, [&](A v, int) { return Act::value(v, param); });
}

// Decided for each element anew: the derivatives of 8 at a time need more registers than there are.
template <typename A>
__device__ A smooth_derivative(Activation activation, A z, A param) {
  switch (activation) {
    case Activation::kElu:
      return Elu::derivative(z, param);
    case Activation::kSilu:
      return Silu::derivative(z, param);
    case Activation::kGelu:
      return Gelu::derivative(z, param);
    case Activation::kGeluTanh:
      return GeluTanh::derivative(z, param);
    default:
      return Hardswish::derivative(z, param);
  }
}

// y = act(z).
template <typename T, bool kSmooth>
__device__ Values<Accumulate<T>> activate(Activation activation, const Values<Accumulate<T>>& z,
                                          Accumulate<T> param) {
  using A = Accumulate<T>;
  if constexpr (kSmooth) {
    switch (activation) {
      case Activation::kElu:
        return smooth_values<Elu>(z, param);
      case Activation::kSilu:
        return smooth_values<Silu>(z, param);
      case Activation::kGelu:
        return smooth_values<Gelu>(z, param);
      case Activation::kGeluTanh:
        return smooth_values<GeluTanh>(z, param);
      default:
        return smooth_values<Hardswish>(z, param);
    }
  } else {
    switch (activation) {
      // Rounding keeps order, 0 and 6: before or after is the same.
      case Activation::kRelu:
        return each(z, [](A v, int) { return v <= A(0) ? A(0) : v; });
      case Activation::kRelu6:
        return each(z, [](A v, int) { return v <= A(0) ? A(0) : v >= A(6) ? A(6) : v; });
      case Activation::kLeakyRelu:
        return each(z, [&](A v, int) {
          const A rounded = round_to<T>(v);
          return rounded > A(0) ? rounded : rounded * param;
        });
      default:
        return z;
    }
  }
}

template <typename Act, typename T>
__device__ unsigned kept_by(const Values<Accumulate<T>>& z) {
  unsigned kept = 0;
#pragma unroll
  for (int e = 0; e < kCellElements; ++e) {
    kept |= static_cast<unsigned>(!Act::drops(round_to<T>(z.value[e]))) << e;
  }
  return kept;
}

// A bit for each element whose derivative is 1, of a piecewise-linear activation.
template <typename T>
__device__ unsigned kept_elements(Activation activation, const Values<Accumulate<T>>& z) {
  switch (activation) {
    case Activation::kRelu:
      return kept_by<Relu, T>(z);
    case Activation::kRelu6:
      return kept_by<Relu6, T>(z);
    default:
      return kept_by<LeakyRelu, T>(z);
  }
}

// dz = dy where the element was kept, less elsewhere.
template <typename A>
__device__ Values<A> masked_gradient(Activation activation, const Values<A>& dy, unsigned kept,
                                     A param) {
  const A dropped = activation == Activation::kLeakyRelu ? param : A(0);
  if (dropped == A(0)) {  // not by a product, which would make nan of an infinite dy
    return each(dy, [&](A v, int e) { return (kept >> e & 1u) != 0 ? v : A(0); });
  }
  return each(dy, [&](A v, int e) { return (kept >> e & 1u) != 0 ? v : v * dropped; });
}

// dz = dy act'(z), z as the forward pass had it.
template <typename T, bool kSmooth>
__device__ Values<Accumulate<T>> activation_gradient(Activation activation,
                                                     const Values<Accumulate<T>>& dy,
                                                     const Values<Accumulate<T>>& z,
                                                     Accumulate<T> param) {
  using A = Accumulate<T>;
  if constexpr (kSmooth) {
    return each(z,
                [&](A v, int e) { return dy.value[e] * smooth_derivative(activation, v, param); });
  } else {
    switch (activation) {
      case Activation::kIdentity:
        return dy;
      case Activation::kRelu:  // the commonest, without a detour by bits
        return each(dy,
                    [&](A v, int e) { return Relu::drops(round_to<T>(z.value[e])) ? A(0) : v; });
      default:
        return masked_gradient(activation, dy, kept_elements<T>(activation, z), param);
    }
  }
}

}  // namespace cuda
}  // namespace batchnorm
