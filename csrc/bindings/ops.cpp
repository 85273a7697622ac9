#include "bindings/ops.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace batchnorm {
namespace bindings {
namespace ops {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor batch_norm(const at::Tensor& input, const OptionalTensor& residual,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps, c10::string_view activation,
                      double activation_param, bool skip_nonfinite, bool skip_recomputation,
                      bool allow_single_value) {
  static const auto op = find<decltype(batch_norm)>("batchnorm_ext::batch_norm");
  return op.call(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                 training, momentum, eps, activation, activation_param, skip_nonfinite,
                 skip_recomputation, allow_single_value);
}

FourTensors forward_train(const at::Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                          double eps, c10::string_view activation, double activation_param,
                          bool save_mask, bool skip_nonfinite, bool skip_recomputation) {
  static const auto op = find<decltype(forward_train)>("batchnorm_ext::forward_train");
  return op.call(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                 momentum, eps, activation, activation_param, save_mask, skip_nonfinite,
                 skip_recomputation);
}

TwoTensors forward_eval(const at::Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                        c10::string_view activation, double activation_param, bool save_mask) {
  static const auto op = find<decltype(forward_eval)>("batchnorm_ext::forward_eval");
  return op.call(input, residual, weight, bias, running_mean, running_var, eps, activation,
                 activation_param, save_mask);
}

TwoTensors eval_statistics(const at::Tensor& running_mean, const at::Tensor& running_var,
                           double eps) {
  static const auto op = find<decltype(eval_statistics)>("batchnorm_ext::eval_statistics");
  return op.call(running_mean, running_var, eps);
}

FourTensors backward(const at::Tensor& grad_output, const OptionalTensor& input,
                     const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
                     const OptionalTensor& mask, bool training, c10::string_view activation,
                     double activation_param, std::array<bool, 4> output_mask,
                     const OptionalTensor& totals) {
  static const auto op = find<decltype(backward)>("batchnorm_ext::backward");
  return op.call(grad_output, input, residual, weight, bias, mean, invstd, mask, training,
                 activation, activation_param, output_mask, totals);
}

}  // namespace ops
}  // namespace bindings
}  // namespace batchnorm
