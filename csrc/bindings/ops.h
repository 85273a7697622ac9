// The operators as C++ functions that go through the dispatcher (defined in autograd.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace batchnorm {
namespace bindings {
namespace ops {

using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor batch_norm(const at::Tensor& input, const OptionalTensor& residual,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps, c10::string_view activation,
                      double activation_param, bool skip_nonfinite, bool skip_recomputation,
                      bool allow_single_value);

FourTensors forward_train(const at::Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                          double eps, c10::string_view activation, double activation_param,
                          bool save_mask, bool skip_nonfinite, bool skip_recomputation);

TwoTensors forward_eval(const at::Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                        c10::string_view activation, double activation_param, bool save_mask);

TwoTensors eval_statistics(const at::Tensor& running_mean, const at::Tensor& running_var,
                           double eps);

FourTensors backward(const at::Tensor& grad_output, const OptionalTensor& input,
                     const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
                     const OptionalTensor& mask, bool training, c10::string_view activation,
                     double activation_param, std::array<bool, 4> output_mask,
                     const OptionalTensor& totals = std::nullopt);

}  // namespace ops

// Buffers are written through their pointers, which autograd does not see.
inline void mark_written(const std::optional<at::Tensor>& buffer) {
  if (buffer && buffer->defined() && !buffer->is_inference()) {
    buffer->unsafeGetTensorImpl()->bump_version();
  }
}
}  // namespace bindings
}  // namespace batchnorm
