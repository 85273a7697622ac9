// The activations that the kernels fuse: y = act(z), z = BN(x) + residual.
#pragma once

#include <cstring>

namespace batchnorm {

enum class Activation : unsigned char {
  kIdentity,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kElu,
  kSilu,
  kGelu,
  kGeluTanh,
  kHardswish,
};

// In the order of the enumeration.
constexpr const char* kActivationNames[] = {"identity", "relu", "relu6",     "leaky_relu", "elu",
                                            "silu",     "gelu", "gelu_tanh", "hardswish"};
constexpr int kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

// False where the name is unknown.
inline bool find_activation(const char* name, Activation* found) {
  for (int i = 0; i < kActivations; ++i) {
    if (std::strcmp(name, kActivationNames[i]) != 0) continue;
    *found = static_cast<Activation>(i);
    return true;
  }
  return false;
}

// Piecewise-linear ones have two derivatives, so one bit per element says which holds. They see z
// rounded to the storage dtype, as a separate activation after a separate batch norm would.
inline bool is_piecewise_linear(Activation a) {
  return a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kLeakyRelu;
}

}  // namespace batchnorm
