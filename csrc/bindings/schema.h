// Every operator's schema: the one page where an argument is added (then in ops.h and in ops.py's
// fakes). Registered by autograd.cpp, which has torch's headers for that already.
#pragma once

namespace batchnorm {
namespace bindings {

constexpr const char* kSchemas[] = {
    // What callers use: differentiable, made of those below.
    "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "bool training, float? momentum, float eps, str activation, float activation_param, "
    "bool skip_nonfinite=False, bool skip_recomputation=False, bool allow_single_value=False) "
    "-> Tensor",
    // y, mean float64 (C,), invstd float64 (C,), mask uint8 (operators.h; empty unless save_mask).
    // skip_recomputation: no running statistics while a backward pass is running.
    "forward_train(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps, str activation, float activation_param, bool save_mask, "
    "bool skip_nonfinite=False, bool skip_recomputation=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "forward_eval(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor running_mean, Tensor running_var, float eps, str activation, "
    "float activation_param, bool save_mask=False) -> (Tensor, Tensor)",
    // What backward needs of running statistics, as they are now: float64 (C,) mean and invstd.
    "eval_statistics(Tensor running_mean, Tensor running_var, float eps) -> (Tensor, Tensor)",
    // Gradients of input, residual, weight, bias; those that output_mask leaves out are empty.
    // Input
    // may be absent in eval mode, with a mask or no activation, if no gradient of weight is asked
    // for.
    "backward(Tensor grad_output, Tensor? input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor invstd, Tensor? mask, bool training, str activation, "
    "float activation_param, bool[4] output_mask, Tensor? totals=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    // For statistics over several processes, each with a part of the batch: of this one, float64
    // (2 C + 1), mean, sum of squared deviations and count; then of all, stacked in the order of
    // ranks, mean, biased variance, invstd, float64 (C,), and count, float64 (1,). Backward takes
    // the sums over all as totals, float64 (2 C + 1): of weight's gradient, of bias's, and the
    // count.
    "moments(Tensor input) -> Tensor",
    "combine_moments(Tensor gathered, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, float eps, SymInt[] input_size, "
    "bool skip_nonfinite=False, bool skip_recomputation=False, bool allow_single_value=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
};

}  // namespace bindings
}  // namespace batchnorm
