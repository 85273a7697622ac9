// What needs torch's headers for autograd and the dispatcher, which take ten seconds to compile:
// the schemas' registration, the operators as C++ functions (ops.h), the differentiable operator,
// one composite op over a C++ autograd Function, and the Function that its backward pass becomes.
#include "bindings/autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/build.h"
#include "bindings/checks.h"
#include "bindings/double_backward.h"
#include "bindings/ops.h"
#include "bindings/schema.h"

namespace batchnorm {
namespace bindings {

// ---- the operators, by way of the dispatcher ----

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

namespace {

using torch::autograd::AutogradContext;

at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); }

// The running statistics are never saved: whoever overwrites them
// between forward and backward (another forward, DDP) changes no gradient.
class BatchNormFunction : public torch::autograd::Function<BatchNormFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input,
                            const OptionalTensor& residual, const OptionalTensor& weight,
                            const OptionalTensor& bias,
                            const c10::intrusive_ptr<Settings>& settings) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Settings& s = *settings;
    const bool identity = s.activation == Activation::kIdentity;
    const bool piecewise_linear = is_piecewise_linear(s.activation);
    // Without statistics of the batch, no gradient but those of weight and of a smooth activation
    // depends on the input.
    const bool save_input =
        s.training || (weight && weight->requires_grad()) || !(identity || piecewise_linear);
    const bool use_mask = piecewise_linear && (residual || !save_input);
    at::Tensor y, mean, invstd, mask;
    if (s.training) {
      std::tie(y, mean, invstd, mask) =
          ops::forward_train(input, residual, weight, bias, s.running_mean, s.running_var,
                             s.num_batches_tracked, s.momentum, s.eps, s.activation_name,
                             s.activation_param, use_mask, s.skip_nonfinite, s.skip_recomputation);
    } else {
      std::tie(y, mask) =
          ops::forward_eval(input, residual, weight, bias, *s.running_mean, *s.running_var, s.eps,
                            s.activation_name, s.activation_param, use_mask);
      std::tie(mean, invstd) = ops::eval_statistics(*s.running_mean, *s.running_var, s.eps);
    }
    s.running_mean = s.running_var = s.num_batches_tracked = std::nullopt;
    const bool save_residual = !identity && !use_mask;
    ctx->save_for_backward({save_input ? input : at::Tensor(),
                            save_residual ? or_undefined(residual) : at::Tensor(),
                            or_undefined(weight), or_undefined(bias), mean, invstd, mask});
    s.given = {true, residual.has_value(), weight.has_value(), bias.has_value()};
    ctx->saved_data["settings"] = c10::IValue::make_capsule(settings);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list gradients(5);
    if (!grad_outputs[0].defined()) return gradients;
    const auto settings =
        c10::static_intrusive_pointer_cast<Settings>(ctx->saved_data["settings"].toCapsule());
    const Settings& s = *settings;
    const variable_list saved = ctx->get_saved_variables();
    std::array<bool, 4> needed;
    std::size_t edge = 0;  // absent arguments have none
    for (std::size_t i = 0; i < needed.size(); ++i) {
      needed[i] = s.given[i] && ctx->needs_input_grad(edge++);
    }
    if (at::GradMode::is_enabled()) {
      const variable_list some = differentiable_backward(grad_outputs[0], saved, s, needed);
      std::copy(some.begin(), some.end(), gradients.begin());
      return gradients;
    }
    // Not by way of the dispatcher's fallback for autograd, which would box every argument.
    at::AutoDispatchBelowADInplaceOrView guard;
    // Without an activation the residual's gradient is dy itself.
    const bool pass_on = needed[kResidual] && s.activation == Activation::kIdentity;
    const std::array<bool, 4> computed{needed[kInput], needed[kResidual] && !pass_on,
                                       needed[kWeight], needed[kBias]};
    const auto [dx, dresidual, dweight, dbias] = ops::backward(
        grad_outputs[0], optional(saved[kInput]), optional(saved[kResidual]),
        optional(saved[kWeight]), optional(saved[kBias]), saved[kMean], saved[kInvstd],
        optional(saved[kMask]), s.training, s.activation_name, s.activation_param, computed);
    if (computed[kInput]) gradients[kInput] = dx;
    if (needed[kResidual]) gradients[kResidual] = pass_on ? grad_outputs[0] : dresidual;
    if (computed[kWeight]) gradients[kWeight] = dweight;
    if (computed[kBias]) gradients[kBias] = dbias;
    return gradients;
  }
};

class NormBackward : public torch::autograd::Function<NormBackward> {
 public:
  // dz, input and weight (float64) have a derivative; the two latter may be undefined.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& dz,
                               const OptionalTensor& input, const OptionalTensor& weight,
                               const NormPointer& norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor x = input.value_or(at::Tensor()), w = weight.value_or(at::Tensor());
    const Parts asked{norm->wanted[kDx], norm->training || norm->wanted[kDweight],
                      norm->training || norm->wanted[kDbias]};
    const auto parts = run_backward(dz, x, w, norm->mean, norm->invstd, norm->training, asked);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({dz, x, w, parts[kDweight], parts[kDbias]});
    ctx->saved_data["norm"] = c10::IValue::make_capsule(norm);
    variable_list gradients;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      if (norm->wanted[i]) gradients.push_back(parts[i]);
    }
    return gradients;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const auto norm = c10::static_intrusive_pointer_cast<Norm>(ctx->saved_data["norm"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    Parts needed{};
    std::size_t edge = 0;  // absent arguments have none
    for (std::size_t i = 0; i < needed.size(); ++i) {
      needed[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    }
    variable_list gradients(4);
    const variable_list some = at::GradMode::is_enabled()
                                   ? derivative_by_torch(given, saved, *norm, needed)
                                   : norm_derivative(given, saved, *norm, needed);
    std::copy(some.begin(), some.end(), gradients.begin());
    return gradients;
  }

 private:
  // Third derivatives and higher.
  static variable_list derivative_by_torch(const variable_list& given, const variable_list& saved,
                                           const Norm& norm, const Parts& needed) {
    // Views, so that the derivative stops at the arguments, of which one may depend on another.
    variable_list arguments(3), wanted, outputs, gradients_of_outputs;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      if (saved[i].defined()) arguments[i] = saved[i].view_as(saved[i]);
      if (needed[i]) wanted.push_back(arguments[i]);
    }
    const variable_list all =
        norm_backward_by_torch(arguments[0], arguments[1], arguments[2], norm);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (!given[i].defined() || !all[i].requires_grad()) continue;
      outputs.push_back(all[i]);
      gradients_of_outputs.push_back(given[i]);
    }
    variable_list gradients(3);
    if (outputs.empty()) return gradients;
    const variable_list found = torch::autograd::grad(outputs, wanted, gradients_of_outputs,
                                                      /*retain_graph=*/true, /*create_graph=*/true,
                                                      /*allow_unused=*/true);
    auto next = found.begin();
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      if (needed[i]) gradients[i] = *next++;
    }
    return gradients;
  }
};

// As torch does: nothing to normalise, nothing learned; the batch still counts.
at::Tensor empty_batch(const at::Tensor& input, const OptionalTensor& residual,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& counter, c10::string_view activation) {
  check_residual(residual, input);
  check_channels(weight, input, "weight");
  check_channels(bias, input, "bias");
  activation_of(std::string(activation));
  at::Tensor output = input.clone();
  if (residual) output = output + *residual;
  // Scalars, so that the dtype stays, and a gradient of zero reaches the parameters.
  if (weight && weight->numel() > 0) output = output * weight->reshape(-1)[0];
  if (bias && bias->numel() > 0) output = output + bias->reshape(-1)[0];
  if (counter) counter->add_(1);
  return output;
}

void check_backend(const at::Tensor& input) {
  const auto device = input.device().type();
  const bool known = device == at::kCPU || device == at::kMeta || (kHasCuda && device == at::kCUDA);
  TORCH_CHECK_NOT_IMPLEMENTED(
      known, "this build of batchnorm_ext has kernels for ",
      kHasCuda ? "the CPU and CUDA devices" : "the CPU", " only, but input is on ", input.device(),
      ". `python -m batchnorm_ext` tells what a build has",
      device == at::kCUDA ? ", BATCHNORM_EXT_CUDA=1 pip install . builds with CUDA" : "",
      "; batchnorm_ext.revert_batchnorm(model) gives back torch's own modules.");
}

void check_call(const at::Tensor& input, const OptionalTensor& running_mean,
                const OptionalTensor& running_var, bool training, double eps,
                bool allow_single_value) {
  check_rank(input);
  check_backend(input);
  if (training && !allow_single_value) {
    TORCH_CHECK_VALUE(
        input.sym_numel() != input.sym_size(1),
        "Expected more than 1 value per channel when training, got input size torch.Size(",
        input.sym_sizes(), ")");
  }
  check_both_or_neither(running_mean.has_value(), running_var.has_value());
  TORCH_CHECK(training || running_mean.has_value(),
              "running_mean must be defined in evaluation mode");
  check_eps(eps, training);
  for (const auto& [buffer, name] :
       {std::pair{running_mean, "running_mean"}, std::pair{running_var, "running_var"}}) {
    TORCH_CHECK(!buffer || !buffer->requires_grad() || !at::GradMode::is_enabled(),
                "the derivative for '", name, "' is not implemented");
  }
}

bool needs_graph(const at::Tensor& input, const OptionalTensor& residual,
                 const OptionalTensor& weight, const OptionalTensor& bias) {
  const auto wants = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  return at::GradMode::is_enabled() &&
         (input.requires_grad() || wants(residual) || wants(weight) || wants(bias));
}

at::Tensor batch_norm(const at::Tensor& input, const OptionalTensor& residual,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps, c10::string_view activation,
                      double activation_param, bool skip_nonfinite, bool skip_recomputation,
                      bool allow_single_value) {
  check_call(input, running_mean, running_var, training, eps, allow_single_value);
  if (input.sym_numel() == 0) {
    return empty_batch(input, residual, weight, bias, num_batches_tracked, activation);
  }
  at::Tensor output;
  if (needs_graph(input, residual, weight, bias)) {
    auto settings = c10::make_intrusive<Settings>();
    settings->training = training;
    settings->momentum = momentum;
    settings->eps = eps;
    settings->activation_name = std::string(activation);
    settings->activation = activation_of(settings->activation_name);
    settings->activation_param = activation_param;
    settings->skip_nonfinite = skip_nonfinite;
    settings->skip_recomputation = skip_recomputation;
    settings->running_mean = running_mean;
    settings->running_var = running_var;
    settings->num_batches_tracked = num_batches_tracked;
    output = BatchNormFunction::apply(input, residual, weight, bias, settings);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (training) {
      output = std::get<0>(ops::forward_train(
          input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
          eps, activation, activation_param, false, skip_nonfinite, skip_recomputation));
    } else {
      output =
          std::get<0>(ops::forward_eval(input, residual, weight, bias, *running_mean, *running_var,
                                        eps, activation, activation_param, false));
    }
  }
  if (training) {
    mark_written(running_mean);
    mark_written(running_var);
    mark_written(num_batches_tracked);
  }
  return output;
}

}  // namespace

variable_list norm_backward(const at::Tensor& dz, const at::Tensor& input, const at::Tensor& weight,
                            const NormPointer& norm) {
  return NormBackward::apply(dz, optional(input), optional(weight), norm);
}

}  // namespace bindings
}  // namespace batchnorm

TORCH_LIBRARY(batchnorm_ext, m) {
  for (const char* const schema : batchnorm::bindings::kSchemas) m.def(schema);
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", TORCH_FN(batchnorm::bindings::batch_norm));
}
