// What the autograd Function of a call keeps, and its backward pass as a differentiable function.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bindings/checks.h"

namespace batchnorm {
namespace bindings {

using variable_list = std::vector<at::Tensor>;  // torch::autograd's, without its headers

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

// The gradients of xhat * weight + bias, in this order where they are wanted.
enum Part { kDx, kDweight, kDbias };
using Parts = std::array<bool, 3>;

struct Norm : torch::CustomClassHolder {
  at::Tensor mean, invstd;  // float64 (C,)
  bool training = false;
  double eps = 0;
  Parts wanted{};
};
using NormPointer = c10::intrusive_ptr<Norm>;

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The gradients of input, residual, weight and bias by the formula of core/calls.h, as a function
// of grad_output and of what was saved that has a derivative: what create_graph=True asks for.
variable_list differentiable_backward(const at::Tensor& grad_output, const variable_list& saved,
                                      const Settings& settings, const std::array<bool, 4>& needed);

// ---- the gradients of xhat * weight + bias, those wanted, from that of its result ----

// As a differentiable function: a Function of its own, by the three below.
variable_list norm_backward(const at::Tensor& dz, const at::Tensor& input, const at::Tensor& weight,
                            const NormPointer& norm);

// dx, sum(dz * xhat) and sum(dz), those of `asked`, by the kernels; weight float64 or undefined.
std::array<at::Tensor, 3> run_backward(const at::Tensor& dz, const at::Tensor& input,
                                       const at::Tensor& weight, const at::Tensor& mean,
                                       const at::Tensor& invstd, bool training, Parts asked);

// In torch's operators, which have every derivative and transform.
variable_list norm_backward_by_torch(const at::Tensor& dz, const at::Tensor& input,
                                     const at::Tensor& weight, const Norm& norm);

// The gradients of dz, input and weight, those needed. given: of the parts that were wanted;
// saved: dz, input, weight, sum(dz * xhat) and sum(dz).
variable_list norm_derivative(const variable_list& given, const variable_list& saved,
                              const Norm& norm, const Parts& needed);

}  // namespace bindings
}  // namespace batchnorm
