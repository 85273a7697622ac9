// What the autograd Function of a call keeps, and its backward pass as a differentiable function.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <optional>
#include <string>

#include "bindings/checks.h"

namespace batchnorm {
namespace bindings {

using torch::autograd::variable_list;

struct Settings : torch::CustomClassHolder {
  bool training = false;
  std::optional<double> momentum;
  double eps = 0;
  std::string activation_name;
  Activation activation = Activation::kIdentity;
  double activation_param = 0;
  bool skip_nonfinite = false, skip_recomputation = false;
  // Written or read in forward only, and no arguments of the Function: they have no gradient.
  OptionalTensor running_mean, running_var, num_batches_tracked;
  std::array<bool, 4> given{};  // which of the differentiable arguments
};

// Positions of the saved tensors; the first four are those of the arguments and their gradients.
enum Saved { kInput, kResidual, kWeight, kBias, kMean, kInvstd, kMask };

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The gradients of input, residual, weight and bias by the formula of core/calls.h, as a function
// of grad_output and of what was saved that has a derivative: what create_graph=True asks for.
variable_list differentiable_backward(const at::Tensor& grad_output, const variable_list& saved,
                                      const Settings& settings, const std::array<bool, 4>& needed);

}  // namespace bindings
}  // namespace batchnorm
