// The operators, the same on every device: checks, tensors -> problem, the call, what is returned.
//
// A Backend is made for each call, from the tensor whose device it runs on. It gives
//   at::Tensor empty(sizes, dtype)       a matrix of whatever content
//   at::Tensor empty_output(like)        the same with another tensor's sizes, strides and dtype
//   at::Tensor empty_passing(like)       ... that nothing keeps for a backward pass
//   bool may_wait()                      whether the host may wait for the device now
//   void run(call)                       any of core/calls.h
//   void eval_statistics(mean, var, eps, c, double* mean, double* invstd)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "bindings/checks.h"
#include "bindings/layout.h"
#include "bindings/ops.h"
#include "core/calls.h"

// As torch/csrc/autograd/graph_task.h has it, which takes as long to compile as all of this.
namespace torch::autograd {
TORCH_API int get_current_graph_task_id();
}

namespace batchnorm {
namespace bindings {

using ops::FourTensors;
using ops::TwoTensors;

inline bool has(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// Kept alive by the caller's variable for as long as the pointer is used.
inline OptionalTensor in_layout_of(const OptionalTensor& tensor, const Problem& problem) {
  if (!has(tensor)) return std::nullopt;
  return in_layout(*tensor, problem.layout);
}

inline void* pointer(const OptionalTensor& tensor) {
  return has(tensor) ? tensor->data_ptr() : nullptr;
}

// Weight and bias are only read, so that any shape and stride may come in.
inline OptionalTensor readable(const OptionalTensor& values) {
  if (!has(values)) return std::nullopt;
  return values->dim() == 1 ? *values : values->reshape(-1);
}

inline void check_forward(const at::Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  check_rank(input);
  dtype_of(input, "input");
  check_both_or_neither(has(running_mean), has(running_var));
  check_channels(running_mean, input, "running_mean");
  check_channels(running_var, input, "running_var");
  check_channels(weight, input, "weight");
  check_channels(bias, input, "bias");
  check_residual(residual, input);
}

// What forward_train writes to, besides.
inline void check_buffers(const at::Tensor& input, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked) {
  check_writable(running_mean, "running_mean");
  check_writable(running_var, "running_var");
  check_counter(num_batches_tracked, input);
}

inline void check_backward(const at::Tensor& grad_output, const at::Tensor& input,
                           const OptionalTensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const at::Tensor& mean,
                           const at::Tensor& invstd, const std::array<bool, 4>& output_mask) {
  check_rank(input);
  dtype_of(input, "input");
  check_like_input(grad_output, input, "grad_output");
  check_residual(residual, input);
  check_channels(weight, input, "weight");
  check_channels(bias, input, "bias");
  for (const auto& [statistic, name] : {std::pair{mean, "mean"}, std::pair{invstd, "invstd"}}) {
    check_channels(statistic, input, name);
    TORCH_CHECK(statistic.scalar_type() == at::kDouble && statistic.is_contiguous(), name,
                " should be contiguous and float64, but got ", statistic.scalar_type());
  }
  TORCH_CHECK(has(weight) || !output_mask[2], "a gradient of weight needs weight, but got None");
  TORCH_CHECK(has(bias) || !output_mask[3], "a gradient of bias needs bias, but got None");
}

// Bits as core/types.h has them, and the layout that they belong to: backward may be handed its
// tensors in another one. Where the host can read the mask its last byte says so, and its shape is
// the same for both layouts, so that a compiler may choose. Elsewhere the shape says it: (N, C,
// bytes of a plane) or (N * spatial, bytes of a row of channels).
template <typename Backend>
std::vector<std::int64_t> mask_shape(const Problem& p) {
  const std::int64_t bytes = mask_row_bytes(p);
  if constexpr (Backend::kHostMemory) {
    if (p.c == 1 || p.s == 1) return {mask_rows(p) * bytes + 1};
    return {p.n * ((p.c + 7) / 8) * ((p.s + 7) / 8) * 8 + 1};  // enough for either
  }
  if (p.layout == Layout::kChannelsLast) return {p.n * p.s, bytes};
  return {p.n, p.c, bytes};
}

template <typename Backend>
Layout layout_of_mask(const at::Tensor& mask) {
  if constexpr (Backend::kHostMemory) {
    return static_cast<Layout>(mask.data_ptr<std::uint8_t>()[mask.numel() - 1]);
  }
  return mask.dim() == 3 ? Layout::kChannelsFirst : Layout::kChannelsLast;
}

template <typename Backend>
at::Tensor empty_mask(const Backend& backend, const Problem& problem, bool wanted) {
  if (!wanted) return backend.empty({0}, at::kByte);
  const at::Tensor mask = backend.empty(mask_shape<Backend>(problem), at::kByte);
  if constexpr (Backend::kHostMemory) {
    mask.data_ptr<std::uint8_t>()[mask.numel() - 1] = static_cast<std::uint8_t>(problem.layout);
  }
  return mask;
}

inline std::uint8_t* bits_of(const at::Tensor& mask) {
  return mask.numel() > 0 ? mask.data_ptr<std::uint8_t>() : nullptr;
}

// Activation checkpointing computes a forward pass again while the backward pass runs.
inline bool is_recomputation() { return torch::autograd::get_current_graph_task_id() != -1; }

inline RunningStatistics running_statistics(const OptionalTensor& mean, const OptionalTensor& var,
                                            const OptionalTensor& num_batches_tracked,
                                            std::optional<double> momentum, bool skip_nonfinite) {
  return {channel_values(mean, "running_mean"),
          channel_values(var, "running_var"),
          has(num_batches_tracked) ? num_batches_tracked->data_ptr<std::int64_t>() : nullptr,
          momentum.value_or(0.0),
          !momentum.has_value(),
          skip_nonfinite};
}

template <typename Backend>
FourTensors forward_train(const at::Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                          double eps, c10::string_view activation_name, double activation_param,
                          bool save_mask, bool skip_nonfinite, bool skip_recomputation) {
  check_forward(input, residual, weight, bias, running_mean, running_var);
  check_buffers(input, running_mean, running_var, num_batches_tracked);
  check_eps(eps, true);
  const Activation activation = activation_of(std::string(activation_name));

  const Backend backend(input);
  const at::Tensor x = in_some_layout(input);
  const Problem problem = problem_of(x);
  const OptionalTensor r = in_layout_of(residual, problem), w = readable(weight),
                       b = readable(bias);
  const at::Tensor y = backend.empty_output(x);
  const at::Tensor mean = backend.empty({problem.c}, at::kDouble);
  const at::Tensor invstd = backend.empty({problem.c}, at::kDouble);
  const bool masked = save_mask && is_piecewise_linear(activation);
  const at::Tensor mask = empty_mask(backend, problem, masked);
  if (problem.numel() == 0) return {y, mean, invstd, mask};
  const bool moves = !(skip_recomputation && is_recomputation());
  backend.run(ForwardTrain{problem, x.data_ptr(), pointer(r), y.data_ptr(), bits_of(mask),
                           channel_values(w, "weight"), channel_values(b, "bias"),
                           moves ? running_statistics(running_mean, running_var,
                                                      num_batches_tracked, momentum, skip_nonfinite)
                                 : RunningStatistics{},
                           eps, activation, activation_param, mean.data_ptr<double>(),
                           invstd.data_ptr<double>(), nullptr});
  return {y, mean, invstd, mask};
}

// mean, sum of squared deviations and, at the end, the count of a channel's elements.
template <typename Backend>
at::Tensor moments(const at::Tensor& input) {
  check_rank(input);
  dtype_of(input, "input");
  const Backend backend(input);
  const at::Tensor x = in_some_layout(input);
  const Problem problem = problem_of(x);
  const at::Tensor packed = backend.empty({2 * problem.c + 1}, at::kDouble);
  packed.narrow(0, 2 * problem.c, 1).fill_(static_cast<double>(problem.per_channel()));
  double* const mean = packed.data_ptr<double>();
  if (problem.numel() == 0) {
    packed.zero_();
  } else {
    ForwardTrain call = {};
    call.problem = problem;
    call.x = x.data_ptr();
    call.eps = 1;
    call.mean = mean;
    call.m2 = mean + problem.c;
    backend.run(call);
  }
  return packed;
}

// Whether the ranks have one value together is known where the statistics are, and waiting for them
// is what no step should do. Where it is so, no rank has more than one: then, and only then, look.
inline void check_values_per_channel(const at::Tensor& gathered, at::IntArrayRef input_size) {
  const std::int64_t here = c10::multiply_integers(input_size);
  if (here > input_size[1]) return;
  const at::Tensor counts = gathered.select(1, gathered.size(1) - 1);
  TORCH_CHECK_VALUE(counts.sum().item<double>() != 1,
                    "Expected more than 1 value per channel when training, got input size "
                    "torch.Size(",
                    input_size, ") here and 1 value on all ranks together");
}

template <typename Backend>
FourTensors combine_moments(const at::Tensor& gathered, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var,
                            const OptionalTensor& num_batches_tracked,
                            std::optional<double> momentum, double eps, at::IntArrayRef input_size,
                            bool skip_nonfinite, bool skip_recomputation, bool allow_single_value) {
  TORCH_CHECK(gathered.dim() == 2 && gathered.size(1) % 2 == 1 && gathered.is_contiguous() &&
                  gathered.scalar_type() == at::kDouble,
              "gathered should be what moments returns from each rank, contiguous float64 of shape "
              "(ranks, 2 * channels + 1), but got ",
              gathered.scalar_type(), " of ", gathered.sizes());
  const std::int64_t c = gathered.size(1) / 2;
  // Stands in for an input of as many channels.
  check_both_or_neither(has(running_mean), has(running_var));
  const at::Tensor channels = gathered.narrow(1, 0, c);
  check_channels(running_mean, channels, "running_mean");
  check_channels(running_var, channels, "running_var");
  check_buffers(channels, running_mean, running_var, num_batches_tracked);
  check_eps(eps, true);

  const Backend backend(gathered);
  if (!allow_single_value && backend.may_wait()) check_values_per_channel(gathered, input_size);
  const auto values = [&](std::int64_t n) { return backend.empty({n}, at::kDouble); };
  const at::Tensor mean = values(c), var = values(c), invstd = values(c), count = values(1);
  const bool moves = !(skip_recomputation && is_recomputation());
  backend.run(CombineMoments{gathered.size(0), c, gathered.data_ptr<double>(),
                             moves
                                 ? running_statistics(running_mean, running_var,
                                                      num_batches_tracked, momentum, skip_nonfinite)
                                 : RunningStatistics{},
                             eps, mean.data_ptr<double>(), var.data_ptr<double>(),
                             invstd.data_ptr<double>(), count.data_ptr<double>()});
  if (moves) {
    for (const auto& buffer : {running_mean, running_var, num_batches_tracked}) {
      mark_written(buffer);
    }
  }
  return {mean, var, invstd, count};
}

template <typename Backend>
TwoTensors forward_eval(const at::Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                        c10::string_view activation_name, double activation_param, bool save_mask) {
  check_forward(input, residual, weight, bias, running_mean, running_var);
  check_eps(eps, false);
  const Activation activation = activation_of(std::string(activation_name));

  const Backend backend(input);
  const at::Tensor x = in_some_layout(input);
  const Problem problem = problem_of(x);
  const OptionalTensor r = in_layout_of(residual, problem), w = readable(weight),
                       b = readable(bias), m = readable(running_mean), v = readable(running_var);
  const at::Tensor y = backend.empty_passing(x);
  const at::Tensor mask =
      empty_mask(backend, problem, save_mask && is_piecewise_linear(activation));
  if (problem.numel() == 0) return {y, mask};
  backend.run(ForwardEval{problem, x.data_ptr(), pointer(r), y.data_ptr(),
                          channel_values(w, "weight"), channel_values(b, "bias"),
                          channel_values(m, "running_mean"), channel_values(v, "running_var"), eps,
                          activation, activation_param, bits_of(mask)});
  return {y, mask};
}

template <typename Backend>
TwoTensors eval_statistics(const at::Tensor& running_mean, const at::Tensor& running_var,
                           double eps) {
  check_device(running_var, running_mean, "running_var");
  TORCH_CHECK(running_mean.numel() == running_var.numel(), "running_var should contain ",
              running_mean.numel(), " elements not ", running_var.numel());
  check_eps(eps, false);
  const Backend backend(running_mean);
  const OptionalTensor m = readable(running_mean), v = readable(running_var);
  const std::int64_t c = m->numel();
  const at::Tensor mean = backend.empty({c}, at::kDouble), invstd = backend.empty({c}, at::kDouble);
  if (c == 0) return {mean, invstd};
  backend.eval_statistics(channel_values(m, "running_mean"), channel_values(v, "running_var"), eps,
                          c, mean.data_ptr<double>(), invstd.data_ptr<double>());
  return {mean, invstd};
}

// The tensor, from in_some_layout, in the layout of the mask's bits.
template <typename Backend>
at::Tensor in_layout_of_mask(const at::Tensor& x, const at::Tensor& mask) {
  check_device(mask, x, "mask");
  const auto refuse = [&](const Problem& p) {
    TORCH_CHECK(
        false, "mask should be what the forward pass returned for this input, contiguous uint8 of ",
        at::IntArrayRef(mask_shape<Backend>(p)), ", but got ", mask.scalar_type(), " of ",
        mask.sizes());
  };
  if (mask.scalar_type() != at::kByte || !mask.is_contiguous()) refuse(problem_of(x));
  const Layout layout = layout_of_mask<Backend>(mask);
  if (layout != Layout::kChannelsFirst && layout != Layout::kChannelsLast) refuse(problem_of(x));
  const at::Tensor moved = in_layout(x, layout);
  const Problem problem = problem_of(moved);
  if (mask.sizes() != at::IntArrayRef(mask_shape<Backend>(problem))) refuse(problem);
  return moved;
}

inline const double* totals_pointer(const OptionalTensor& totals, const at::Tensor& input,
                                    const std::array<bool, 4>& output_mask) {
  if (!has(totals)) return nullptr;
  check_device(*totals, input, "totals");
  TORCH_CHECK(totals->scalar_type() == at::kDouble && totals->is_contiguous() &&
                  totals->numel() == 2 * input.size(1) + 1,
              "totals should be contiguous float64 of ", 2 * input.size(1) + 1,
              " elements, the sums of all ranks for weight and for bias and their count, but got ",
              totals->scalar_type(), " of ", totals->sizes());
  TORCH_CHECK(!output_mask[2] && !output_mask[3],
              "with totals, the gradients of weight and bias are known, but they were asked for");
  return totals->data_ptr<double>();
}

inline ChannelValues values_of(const at::Tensor& gradient, bool wanted, const char* name) {
  return wanted ? channel_values(gradient.view(-1), name) : ChannelValues{};
}

// Where no input was saved, the gradient of the output stands in for it: of its shape and dtype,
// and nothing depends on its values.
inline void check_absent_input(const at::Tensor& grad_output, bool masked, bool training,
                               Activation activation, bool needs_dweight) {
  check_rank(grad_output);
  TORCH_CHECK(!training && !needs_dweight && (masked || activation == Activation::kIdentity),
              "backward needs input in training, for the gradient of weight, and for an activation "
              "without a mask, but got None");
}

template <typename Backend>
FourTensors backward(const at::Tensor& grad_output, const OptionalTensor& given_input,
                     const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
                     const OptionalTensor& mask, bool training, c10::string_view activation_name,
                     double activation_param, std::array<bool, 4> output_mask,
                     const OptionalTensor& totals) {
  const Activation activation = activation_of(std::string(activation_name));
  const bool masked = has(mask) && mask->numel() > 0;
  if (!has(given_input)) {
    check_absent_input(grad_output, masked, training, activation, output_mask[2]);
  }
  const at::Tensor& input = has(given_input) ? *given_input : grad_output;
  check_backward(grad_output, input, residual, weight, bias, mean, invstd, output_mask);
  const double* const sums = totals_pointer(totals, input, output_mask);

  const Backend backend(input);
  const at::Tensor given = in_some_layout(input);
  const at::Tensor x = masked ? in_layout_of_mask<Backend>(given, *mask) : given;
  const Problem problem = problem_of(x);
  const std::uint8_t* const bits = masked ? mask->data_ptr<std::uint8_t>() : nullptr;
  const at::Tensor dy = in_layout(grad_output, problem.layout);
  const OptionalTensor r = bits ? std::nullopt : in_layout_of(residual, problem),
                       w = readable(weight), b = readable(bias);
  const auto output = [&](bool wanted) {
    return wanted ? backend.empty_output(x) : backend.empty({0}, x.scalar_type());
  };
  const auto values = [&](bool wanted, const OptionalTensor& like) {
    return wanted ? backend.empty(like->sizes(), like->scalar_type())
                  : backend.empty({0}, x.scalar_type());
  };
  const at::Tensor dx = output(output_mask[0]), dresidual = output(output_mask[1]);
  const at::Tensor dweight = values(output_mask[2], weight), dbias = values(output_mask[3], bias);
  if (problem.numel() == 0) {
    for (const at::Tensor& gradient : {dweight, dbias}) gradient.zero_();
    return {dx, dresidual, dweight, dbias};
  }
  backend.run(Backward{
      problem, dy.data_ptr(), x.data_ptr(), pointer(r), bits, channel_values(w, "weight"),
      channel_values(b, "bias"), mean.data_ptr<double>(), invstd.data_ptr<double>(), training,
      activation, activation_param, output_mask[0] ? dx.data_ptr() : nullptr,
      output_mask[1] ? dresidual.data_ptr() : nullptr, values_of(dweight, output_mask[2], "weight"),
      values_of(dbias, output_mask[3], "bias"), sums});
  // The layout that callers were told of, whatever the mask has.
  const auto told = [&](const at::Tensor& gradient) {
    return x.is_same(given) || gradient.numel() == 0
               ? gradient
               : in_layout(gradient, problem_of(given).layout);
  };
  return {told(dx), told(dresidual), dweight, dbias};
}

// To be called in a TORCH_LIBRARY_IMPL block.
template <typename Backend>
void register_operators(torch::Library& library) {
  library.impl("forward_train", TORCH_FN(forward_train<Backend>));
  library.impl("forward_eval", TORCH_FN(forward_eval<Backend>));
  library.impl("moments", TORCH_FN(moments<Backend>));
  library.impl("combine_moments", TORCH_FN(combine_moments<Backend>));
  library.impl("eval_statistics", TORCH_FN(eval_statistics<Backend>));
  library.impl("backward", TORCH_FN(backward<Backend>));
}

}  // namespace bindings
}  // namespace batchnorm
