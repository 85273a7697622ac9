// The differentiable operator: one composite op over a C++ autograd Function.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/SymIntArrayRef.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>

#include "bindings/build.h"
#include "bindings/checks.h"
#include "bindings/ops.h"

namespace batchnorm {
namespace bindings {
namespace {

using torch::autograd::AutogradContext;
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

OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); }

// dy * act'(z) of the smooth activations, in operators that are differentiable themselves.
at::Tensor smooth_gradient(const at::Tensor& dy, const at::Tensor& z, const Settings& s) {
  switch (s.activation) {
    case Activation::kElu:
      return at::elu_backward(dy, s.activation_param, 1, 1, false, z);
    case Activation::kSilu: {
      const at::Tensor sigmoid = z.sigmoid();
      return dy * sigmoid * (1 + z * (1 - sigmoid));
    }
    case Activation::kGelu:
      return at::gelu_backward(dy, z, "none");
    case Activation::kGeluTanh:
      return at::gelu_backward(dy, z, "tanh");
    case Activation::kHardswish:
      return at::hardswish_backward(dy, z);
    default:
      return dy;
  }
}

// The kernels' own act'(z) of the piecewise-linear ones, a constant almost everywhere: 1, or less
// where the forward pass dropped the element.
at::Tensor is_kept(const at::Tensor& dy, const variable_list& saved, const Settings& s) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor ones = at::ones_like(saved[kInput].defined() ? saved[kInput] : dy);
  const auto gradients = ops::backward(
      ones, optional(saved[kInput]), optional(saved[kResidual]), optional(saved[kWeight]),
      optional(saved[kBias]), saved[kMean], saved[kInvstd], optional(saved[kMask]), s.training,
      s.activation_name, 0, {false, true, false, false});
  return std::get<1>(gradients) == 1;
}

// The gradients by the formula of core/calls.h, as a differentiable function of dy, input,
// residual, weight and bias: what create_graph=True asks for. Statistics are computed again, so
// that they are part of the graph.
variable_list differentiable_backward(const at::Tensor& grad_output, const variable_list& saved,
                                      const Settings& s, const std::array<bool, 4>& needed) {
  const at::Tensor &input = saved[kInput], &residual = saved[kResidual], &weight = saved[kWeight],
                   &bias = saved[kBias];
  const at::ScalarType outer = grad_output.scalar_type();
  const auto dtype = outer == at::kDouble ? at::kDouble : at::kFloat;
  const std::int64_t rank = grad_output.dim();
  std::vector<std::int64_t> dims(static_cast<std::size_t>(rank - 1));
  std::iota(dims.begin(), dims.end(), 1);
  dims[0] = 0;  // all but the channels': 0, 2, 3, ...
  std::vector<std::int64_t> per_channel(static_cast<std::size_t>(rank), 1);
  per_channel[1] = -1;
  const auto channels = [&](const at::Tensor& values) {
    return values.to(dtype).reshape(per_channel);
  };

  const at::Tensor dy = grad_output.to(dtype);
  at::Tensor invstd = channels(saved[kInvstd]), normalized;
  if (input.defined()) {
    // A shift by a constant changes no derivative, and keeps the digits of x far from 0.
    at::Tensor centered = input.to(dtype) - channels(saved[kMean]);
    if (s.training) {
      centered = centered - centered.mean(dims, true);
      invstd = (centered.square().mean(dims, true) + s.eps).rsqrt();
    }
    normalized = centered * invstd;
  }
  at::Tensor dz = dy;
  if (is_piecewise_linear(s.activation)) {
    const bool leaky = s.activation == Activation::kLeakyRelu;
    dz = at::where(is_kept(grad_output, saved, s), dy,
                   leaky ? dy * s.activation_param : at::zeros_like(dy));
  } else if (s.activation != Activation::kIdentity) {
    at::Tensor z = normalized;
    if (weight.defined()) z = z * channels(weight);
    if (bias.defined()) z = z + channels(bias);
    if (residual.defined()) z = z + residual.to(dtype);
    dz = smooth_gradient(dy, z, s);
  }
  const auto shaped_like = [](const at::Tensor& gradient, const at::Tensor& value) {
    return gradient.reshape_symint(value.sym_sizes()).to(value.scalar_type());
  };
  variable_list gradients(4);
  if (needed[kInput]) {
    const at::Tensor scale = weight.defined() ? invstd * channels(weight) : invstd;
    at::Tensor inner = dz;
    if (s.training) {
      inner = dz - dz.mean(dims, true) - normalized * (dz * normalized).mean(dims, true);
    }
    gradients[kInput] = (inner * scale).to(outer);
  }
  if (needed[kResidual]) gradients[kResidual] = dz.to(outer);
  if (needed[kWeight]) {
    gradients[kWeight] = shaped_like((dz * normalized).sum(dims, true), weight);
  }
  if (needed[kBias]) gradients[kBias] = shaped_like(dz.sum(dims, true), bias);
  return gradients;
}

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

void mark_written(const OptionalTensor& buffer) {
  if (buffer && !buffer->is_inference()) buffer->unsafeGetTensorImpl()->bump_version();
}

void check_backend(const at::Tensor& input) {
  const auto device = input.device().type();
  const bool known = device == at::kCPU || device == at::kMeta || (kHasCuda && device == at::kCUDA);
  TORCH_CHECK_NOT_IMPLEMENTED(
      known, "this build of batchnorm_ext has kernels for ",
      kHasCuda ? "the CPU and CUDA devices" : "the CPU", " only, but input is on ", input.device(),
      ". `python -m batchnorm_ext` tells what a build has",
      device == at::kCUDA ? ", BATCHNORM_EXT_CUDA=1 pip install --no-build-isolation . builds with "
                            "CUDA"
                          : "",
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
}  // namespace bindings
}  // namespace batchnorm

TORCH_LIBRARY_IMPL(batchnorm_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", TORCH_FN(batchnorm::bindings::batch_norm));
}
