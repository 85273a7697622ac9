// Backward as a differentiable function, in two steps that have a derivative each: dz = dy *
// act'(z) in torch's operators, then the gradients of xhat * weight + bias from dz. Included by
// autograd.cpp alone: torch's headers take five times as long to compile as this does.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
// Without "_ops" they would bring headers that take seconds to compile.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/elu_backward_ops.h>
#include <ATen/ops/gelu_backward_ops.h>
#include <ATen/ops/hardswish_backward_ops.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <numeric>

#include "bindings/autograd.h"
#include "bindings/ops.h"

namespace batchnorm {
namespace bindings {

struct Dimensions {
  explicit Dimensions(std::int64_t rank)
      : reduced(static_cast<std::size_t>(rank - 1)), per_channel(reduced.size() + 1, 1) {
    std::iota(reduced.begin(), reduced.end(), 1);
    reduced[0] = 0;
    per_channel[1] = -1;
  }
  std::vector<std::int64_t> reduced;      // all but the channels': 0, 2, 3, ...
  std::vector<std::int64_t> per_channel;  // the shape of channels' values beside an input
};

// Half-precision values are computed with in float32.
inline at::ScalarType compute_dtype(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Batched by vmap, torch.func's or that of is_grads_batched, for which C++ Functions have no rule.
inline bool is_batched() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::VmapMode);
}

// ---- in torch's operators, which have every derivative and transform ----

struct Normalized {
  at::Tensor values, invstd;  // values are undefined without input
};

// Statistics of the batch are computed again, so that they are part of the graph.
inline Normalized normalize(const at::Tensor& input, const Norm& norm, const Dimensions& dims,
                            at::ScalarType dtype) {
  at::Tensor invstd = norm.invstd.to(dtype).reshape(dims.per_channel);
  if (!input.defined()) return {at::Tensor(), invstd};
  // A shift by a constant changes no derivative, and keeps the digits of x far from 0.
  at::Tensor centered = input.to(dtype) - norm.mean.to(dtype).reshape(dims.per_channel);
  if (norm.training) {
    centered = centered - centered.mean(dims.reduced, true);
    invstd = (centered.square().mean(dims.reduced, true) + norm.eps).rsqrt();
  }
  return {centered * invstd, invstd};
}

// ---- by formulas, on the fused kernels ----

// values * slope + offset + added, per channel.
inline at::Tensor affine(const at::Tensor& values, const at::Tensor& slope,
                         const at::Tensor& offset, const at::Tensor& added,
                         const at::Tensor& center = {}) {
  const at::Tensor mean = center.defined() ? center : at::zeros_like(slope);
  return std::get<0>(ops::forward_eval(values, optional(added), slope, optional(offset), mean,
                                       at::ones_like(slope), 0, kActivationNames[0], 0, false));
}

// By part, undefined where there is none.
inline std::array<at::Tensor, 3> spread(const variable_list& given, const Norm& norm) {
  std::array<at::Tensor, 3> parts;
  auto next = given.begin();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (norm.wanted[i]) parts[i] = *next++;
  }
  return parts;
}

// ---- the activation ----

// dy * act'(z) of the smooth activations.
inline at::Tensor smooth_gradient(const at::Tensor& dy, const at::Tensor& z, const Settings& s) {
  switch (s.activation) {
    case Activation::kElu:
      return at::_ops::elu_backward::call(dy, s.activation_param, 1, 1, false, z);
    case Activation::kSilu: {
      const at::Tensor sigmoid = z.sigmoid();
      return dy * sigmoid * (1 + z * (1 - sigmoid));
    }
    case Activation::kGelu:
      return at::_ops::gelu_backward::call(dy, z, "none");
    case Activation::kGeluTanh:
      return at::_ops::gelu_backward::call(dy, z, "tanh");
    case Activation::kHardswish:
      return at::_ops::hardswish_backward::call(dy, z);
    default:
      return dy;
  }
}

// The kernels' own act'(z) of the piecewise-linear ones, a constant almost everywhere: 1, or less
// where the forward pass dropped the element.
inline at::Tensor is_kept(const at::Tensor& dy, const variable_list& saved, const Settings& s) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor ones = at::ones_like(saved[kInput].defined() ? saved[kInput] : dy);
  const auto gradients = ops::backward(
      ones, optional(saved[kInput]), optional(saved[kResidual]), optional(saved[kWeight]),
      optional(saved[kBias]), saved[kMean], saved[kInvstd], optional(saved[kMask]), s.training,
      s.activation_name, 0, {false, true, false, false});
  return std::get<1>(gradients) == 1;
}

// z, what the activation was given, as a function of the arguments.
inline at::Tensor pre_activation(const variable_list& saved, const Settings& s, const Norm& norm) {
  const at::Tensor &input = saved[kInput], &residual = saved[kResidual], &weight = saved[kWeight],
                   &bias = saved[kBias];
  if (!is_batched()) {
    OptionalTensor mean, var;
    if (!s.training) std::tie(mean, var) = std::tuple(norm.mean, norm.invstd.square().reciprocal());
    return ops::batch_norm(input, optional(residual), optional(weight), optional(bias), mean, var,
                           std::nullopt, s.training, 0.0, s.training ? s.eps : 0.0,
                           kActivationNames[0], 0, false, false, /*allow_single_value=*/true);
  }
  const Dimensions dims(input.dim());
  const at::ScalarType dtype = compute_dtype(input);
  at::Tensor z = normalize(input, norm, dims, dtype).values;
  if (weight.defined()) z = z * weight.to(dtype).reshape(dims.per_channel);
  if (bias.defined()) z = z + bias.to(dtype).reshape(dims.per_channel);
  if (residual.defined()) z = z + residual.to(dtype);
  return z.to(input.scalar_type());
}

inline at::Tensor through_activation(const at::Tensor& dy, const variable_list& saved,
                                     const Settings& s, const Norm& norm) {
  if (s.activation == Activation::kIdentity) return dy;
  if (is_piecewise_linear(s.activation)) {
    const bool leaky = s.activation == Activation::kLeakyRelu;
    return dy.where(is_kept(dy, saved, s), leaky ? dy * s.activation_param : at::zeros_like(dy));
  }
  return smooth_gradient(dy, pre_activation(saved, s, norm), s);
}

inline variable_list norm_backward_by_torch(const at::Tensor& dz, const at::Tensor& input,
                                            const at::Tensor& weight, const Norm& norm) {
  const Dimensions dims(dz.dim());
  const at::ScalarType dtype = compute_dtype(dz);
  const auto [normalized, invstd] = normalize(input, norm, dims, dtype);
  const at::Tensor g = dz.to(dtype);
  variable_list gradients;
  if (norm.wanted[kDx]) {
    at::Tensor inner = g;
    if (norm.training) {
      inner =
          g - g.mean(dims.reduced, true) - normalized * (g * normalized).mean(dims.reduced, true);
    }
    const at::Tensor scale =
        weight.defined() ? invstd * weight.to(dtype).reshape(dims.per_channel) : invstd;
    gradients.push_back((inner * scale).to(dz.scalar_type()));
  }
  const auto sum = [&](const at::Tensor& values) {
    return values.sum(dims.reduced).to(at::kDouble);
  };
  if (norm.wanted[kDweight]) gradients.push_back(sum(g * normalized));
  if (norm.wanted[kDbias]) gradients.push_back(sum(g));
  return gradients;
}

inline std::array<at::Tensor, 3> run_backward(const at::Tensor& dz, const at::Tensor& input,
                                              const at::Tensor& weight, const at::Tensor& mean,
                                              const at::Tensor& invstd, bool training,
                                              Parts asked) {
  // The sums have the parameters' dtype.
  const at::Tensor parameter = weight.defined() ? weight : at::ones_like(invstd);
  const auto [dx, dresidual, dweight, dbias] = ops::backward(
      dz, optional(input), std::nullopt, parameter, parameter, mean, invstd, std::nullopt, training,
      kActivationNames[0], 0, {asked[kDx], false, asked[kDweight], asked[kDbias]});
  return {dx, dweight, dbias};
}

// What torch calls batchnorm_double_backward. With P(v) = v - mean(v) - xhat * mean(v * xhat) in
// training and P(v) = v in evaluation, backward is
//   dx = weight * invstd * P(dz), dweight = sum(dz * xhat), dbias = sum(dz).
// For gradients gx, gw, gb of these three, with u = (gw - weight * invstd * mean(gx * xhat)) * dz
// - weight * invstd * mean(dz * xhat) * gx in training and u = gw * dz in evaluation, those of its
// arguments are
//   dz:     weight * invstd * P(gx) + gw * xhat + gb
//   weight: invstd * sum(gx * P(dz))
//   x:      invstd * P(u) - weight * invstd^2 * mean(gx * P(dz)) * xhat, the last in training only.
inline variable_list norm_derivative(const variable_list& given_where_wanted,
                                     const variable_list& saved, const Norm& norm,
                                     const Parts& needed) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto [gx, gw, gb] = spread(given_where_wanted, norm);
  const at::Tensor &dz = saved[0], &x = saved[1], &dz_xhat = saved[3], &dz_sum = saved[4];
  const at::Tensor &s = norm.invstd, zero = at::zeros_like(s), one = at::ones_like(s);
  const at::Tensor w = saved[2].defined() ? saved[2] : one;
  const at::Scalar n(dz.sym_numel() / dz.sym_size(1));
  const bool batch = norm.training;

  at::Tensor grad_dz, gx_xhat = zero, gx_sum = zero;
  if (gx.defined()) {
    const auto parts = run_backward(gx, x, w, norm.mean, s, batch, {needed[0], batch, batch});
    if (needed[0]) grad_dz = parts[kDx];
    if (batch) std::tie(gx_xhat, gx_sum) = std::tie(parts[kDweight], parts[kDbias]);
  }
  if (needed[0] && gw.defined()) {
    grad_dz = affine(x, gw * s, gb, grad_dz, norm.mean);
  } else if (needed[0] && gb.defined()) {
    const at::Tensor added = gb.to(dz.scalar_type()).reshape(Dimensions(dz.dim()).per_channel);
    grad_dz = gx.defined() ? grad_dz + added : added.expand_as(dz);
  }

  at::Tensor inner = zero;  // sum(gx * P(dz))
  if (gx.defined() && (needed[2] || (needed[1] && batch))) {
    inner = run_backward(gx, dz, {}, zero, one, false, {false, true, false})[kDweight];
    if (batch) inner = inner - (gx_sum * dz_sum + gx_xhat * dz_xhat) / n;
  }
  variable_list gradients{needed[0] ? grad_dz : at::Tensor(), at::Tensor(),
                          needed[2] && gx.defined() ? inner * s : at::Tensor()};
  if (!needed[1]) return gradients;
  // u = of_dz * dz + of_gx * gx
  at::Tensor of_dz = gw.defined() ? gw : zero, of_gx = zero;
  if (batch) {
    of_dz = of_dz - w * s * gx_xhat / n;
    of_gx = -w * s * dz_xhat / n;
  } else if (!gw.defined()) {
    return gradients;
  }
  at::Tensor u = affine(dz, s * of_dz, {}, {});
  if (batch && gx.defined()) u = affine(gx, s * of_gx, {}, u);
  if (batch) {
    const at::Tensor u_mean = (of_dz * dz_sum + of_gx * gx_sum) / n;
    const at::Tensor u_xhat = (of_dz * dz_xhat + of_gx * gx_xhat) / n;
    u = affine(x, -s * s * (u_xhat + w * s * inner / n), -s * u_mean, u, norm.mean);
  }
  gradients[1] = u;
  return gradients;
}

inline variable_list differentiable_backward(const at::Tensor& grad_output,
                                             const variable_list& saved, const Settings& settings,
                                             const std::array<bool, 4>& needed) {
  const auto norm = c10::make_intrusive<Norm>();
  norm->mean = saved[kMean];
  norm->invstd = saved[kInvstd];
  norm->training = settings.training;
  norm->eps = settings.eps;
  norm->wanted = {needed[kInput], needed[kWeight], needed[kBias]};

  const at::Tensor dz = through_activation(grad_output, saved, settings, *norm);
  const at::Tensor weight =
      saved[kWeight].defined() ? saved[kWeight].reshape(-1).to(at::kDouble) : at::Tensor();
  variable_list parts;
  if (norm->wanted != Parts{}) {
    parts = is_batched() ? norm_backward_by_torch(dz, saved[kInput], weight, *norm)
                         : norm_backward(dz, saved[kInput], weight, norm);
  }

  variable_list gradients(4);
  auto next = parts.begin();
  if (needed[kInput]) gradients[kInput] = *next++;
  if (needed[kResidual]) gradients[kResidual] = dz;
  for (const Saved parameter : {kWeight, kBias}) {
    if (!needed[parameter]) continue;
    const at::Tensor& like = saved[parameter];
    gradients[parameter] = (next++)->reshape_symint(like.sym_sizes()).to(like.scalar_type());
  }
  return gradients;
}

}  // namespace bindings
}  // namespace batchnorm
