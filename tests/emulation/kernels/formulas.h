// The activations in double, as torch's documentation has them.
#pragma once

#include <cmath>

#include "core/activation.h"

namespace check {

using batchnorm::Activation;

inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

inline double activate(Activation a, double z, double param) {
  switch (a) {
    case Activation::kRelu:
      return std::fmax(z, 0);
    case Activation::kRelu6:
      return std::fmin(std::fmax(z, 0), 6);
    case Activation::kLeakyRelu:
      return z > 0 ? z : param * z;
    case Activation::kElu:
      return z > 0 ? z : param * std::expm1(z);
    case Activation::kSilu:
      return z * sigmoid(z);
    case Activation::kGelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return z * sigmoid(2 * std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z));
    case Activation::kHardswish:
      return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    default:
      return z;
  }
}

inline double smooth_derivative(Activation a, double z, double param) {
  const double s = sigmoid(z), density = std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
  const double k = 2 * std::sqrt(2 / M_PI), gate = sigmoid(k * (z + 0.044715 * z * z * z));
  switch (a) {
    case Activation::kElu:
      return z > 0 ? 1 : param * std::exp(z);
    case Activation::kSilu:
      return s + z * s * (1 - s);
    case Activation::kGelu:
      return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * density;
    case Activation::kGeluTanh:
      return gate + z * gate * (1 - gate) * k * (1 + 3 * 0.044715 * z * z);
    default:
      return z <= -3 ? 0 : z >= 3 ? 1 : (2 * z + 3) / 6;
  }
}

// Where a derivative jumps, and its value is decided by a rounding error.
inline bool is_kink(Activation a, double z) {
  return a == Activation::kHardswish ? std::fabs(std::fabs(z) - 3) < 1e-3
                                     : a == Activation::kElu && std::fabs(z) < 1e-3;
}

// Whether the forward pass dropped the element, by what it wrote: relu and relu6 keep nan.
inline bool was_dropped(Activation a, double y) {
  if (a == Activation::kLeakyRelu) return !(y > 0);
  return y <= 0 || (a == Activation::kRelu6 && y >= 6);
}

}  // namespace check
