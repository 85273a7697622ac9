// The operators on CPU tensors: checks, tensors -> problem, allocation, the call.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/checks.h"
#include "bindings/layout.h"
#include "bindings/planning.h"
#include "cpu/batchnorm.h"

namespace batchnorm {
namespace bindings {
namespace {

void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
  at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) body(i);
  });
}

bool has(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// Kept alive by the caller's variable for as long as the pointer is used.
OptionalTensor in_layout_of(const OptionalTensor& tensor, const Problem& problem) {
  if (!has(tensor)) return std::nullopt;
  return in_layout(*tensor, problem.layout);
}

void* pointer(const OptionalTensor& tensor) { return has(tensor) ? tensor->data_ptr() : nullptr; }

// Weight and bias are only read, so that any shape and stride may come in.
OptionalTensor readable(const OptionalTensor& values) {
  if (!has(values)) return std::nullopt;
  return values->dim() == 1 ? *values : values->reshape(-1);
}

// A fresh block above the C library's mmap threshold costs a page fault per 4 KiB, which takes
// several times as long as filling it (docs/measured-facts.md). Huge pages make that one per 2 MiB;
// the kernel may ignore the hint.
void ask_for_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = 4096;
  constexpr std::size_t kWorthwhile = 4 << 20;
  if (tensor.nbytes() < kWorthwhile) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + tensor.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

// Allocation without the dispatcher, which takes longer than the kernels do on a small tensor.
at::Tensor empty_matrix(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::Tensor(at::detail::empty_cpu(sizes, dtype));
}

at::Tensor empty_output(const at::Tensor& like) {
  at::Tensor output(
      at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
  ask_for_huge_pages(output);
  return output;
}

at::Tensor empty_like_values(const at::Tensor& values) {
  return empty_matrix(values.sizes(), values.scalar_type());
}

at::Tensor empty_mask(const Problem& problem, bool wanted) {
  if (!wanted) return empty_matrix({0}, at::kByte);
  return empty_matrix({mask_rows(problem), mask_row_bytes(problem)}, at::kByte);
}

void check_forward(const at::Tensor& input, const OptionalTensor& residual,
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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_train(
    const at::Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, c10::string_view activation_name,
    double activation_param, bool save_mask) {
  check_forward(input, residual, weight, bias, running_mean, running_var);
  check_writable(running_mean, "running_mean");
  check_writable(running_var, "running_var");
  check_counter(num_batches_tracked, input);
  check_eps(eps, true);
  const Activation activation = activation_of(std::string(activation_name));

  const at::Tensor x = in_some_layout(input);
  const Problem problem = problem_of(x);
  const OptionalTensor r = in_layout_of(residual, problem), w = readable(weight),
                       b = readable(bias);
  const at::Tensor y = empty_output(x);
  const at::Tensor mean = empty_matrix({problem.c}, at::kDouble);
  const at::Tensor invstd = empty_matrix({problem.c}, at::kDouble);
  const at::Tensor mask = empty_mask(problem, save_mask && is_piecewise_linear(activation));
  const bool masked = mask.numel() > 0;
  if (problem.numel() > 0) {
    const ForwardTrain call{
        problem,
        x.data_ptr(),
        pointer(r),
        y.data_ptr(),
        masked ? mask.data_ptr<std::uint8_t>() : nullptr,
        channel_values(w, "weight"),
        channel_values(b, "bias"),
        channel_values(running_mean, "running_mean"),
        channel_values(running_var, "running_var"),
        has(num_batches_tracked) ? num_batches_tracked->data_ptr<std::int64_t>() : nullptr,
        momentum.value_or(0.0),
        !momentum.has_value(),
        eps,
        activation,
        activation_param,
        mean.data_ptr<double>(),
        invstd.data_ptr<double>()};
    cpu::forward_train(call, plan_here(problem, Pass::kForward, masked), parallel_for);
  }
  return {y, mean, invstd, mask};
}

at::Tensor forward_eval(const at::Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                        c10::string_view activation_name, double activation_param) {
  check_forward(input, residual, weight, bias, running_mean, running_var);
  check_eps(eps, false);
  const Activation activation = activation_of(std::string(activation_name));

  const at::Tensor x = in_some_layout(input);
  const Problem problem = problem_of(x);
  const OptionalTensor r = in_layout_of(residual, problem), w = readable(weight),
                       b = readable(bias), m = readable(running_mean), v = readable(running_var);
  const at::Tensor y = empty_output(x);
  if (problem.numel() > 0) {
    const ForwardEval call{problem,
                                x.data_ptr(),
                                pointer(r),
                                y.data_ptr(),
                                channel_values(w, "weight"),
                                channel_values(b, "bias"),
                                channel_values(m, "running_mean"),
                                channel_values(v, "running_var"),
                                eps,
                                activation,
                                activation_param};
    cpu::forward_eval(call, plan_here(problem, Pass::kEval, false), parallel_for);
  }
  return y;
}

std::tuple<at::Tensor, at::Tensor> eval_statistics(const at::Tensor& running_mean,
                                                   const at::Tensor& running_var, double eps) {
  TORCH_CHECK(running_mean.numel() == running_var.numel(), "running_var should contain ",
              running_mean.numel(), " elements not ", running_var.numel());
  check_eps(eps, false);
  const OptionalTensor m = readable(running_mean), v = readable(running_var);
  const at::Tensor mean = empty_matrix({m->numel()}, at::kDouble);
  const at::Tensor invstd = empty_matrix({m->numel()}, at::kDouble);
  cpu::eval_statistics(channel_values(m, "running_mean"), channel_values(v, "running_var"), eps,
                       m->numel(), mean.data_ptr<double>(), invstd.data_ptr<double>());
  return {mean, invstd};
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& input,
                    const OptionalTensor& residual, const OptionalTensor& weight,
                    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
                    const std::array<bool, 4>& output_mask) {
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

const std::uint8_t* mask_pointer(const OptionalTensor& mask, const Problem& problem) {
  if (!has(mask) || mask->numel() == 0) return nullptr;
  TORCH_CHECK(mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                  mask->numel() == mask_rows(problem) * mask_row_bytes(problem),
              "mask should be what forward_train returned for this input, contiguous uint8 of ",
              mask_rows(problem), " x ", mask_row_bytes(problem), ", but got ", mask->scalar_type(),
              " of ", mask->sizes());
  return mask->data_ptr<std::uint8_t>();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& residual,
    const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& mask, bool training,
    c10::string_view activation_name, double activation_param, std::array<bool, 4> output_mask) {
  check_backward(grad_output, input, residual, weight, bias, mean, invstd, output_mask);
  const Activation activation = activation_of(std::string(activation_name));

  const at::Tensor x = in_some_layout(input);
  const Problem problem = problem_of(x);
  const std::uint8_t* const bits = mask_pointer(mask, problem);
  const at::Tensor dy = in_layout(grad_output, problem.layout);
  const OptionalTensor r = bits ? std::nullopt : in_layout_of(residual, problem),
                       w = readable(weight), b = readable(bias);
  const auto none = [&] { return empty_matrix({0}, x.scalar_type()); };
  const at::Tensor dx = output_mask[0] ? empty_output(x) : none();
  const at::Tensor dresidual = output_mask[1] ? empty_output(x) : none();
  const at::Tensor dweight = output_mask[2] ? empty_like_values(*weight) : none();
  const at::Tensor dbias = output_mask[3] ? empty_like_values(*bias) : none();
  if (problem.numel() == 0) {
    for (const at::Tensor& gradient : {dweight, dbias}) gradient.zero_();
    return {dx, dresidual, dweight, dbias};
  }
  const auto gradient_values = [](const at::Tensor& gradient, bool wanted, const char* name) {
    return wanted ? channel_values(gradient.view(-1), name) : ChannelValues{};
  };
  const Backward call{problem,
                           dy.data_ptr(),
                           x.data_ptr(),
                           pointer(r),
                           bits,
                           channel_values(w, "weight"),
                           channel_values(b, "bias"),
                           mean.data_ptr<double>(),
                           invstd.data_ptr<double>(),
                           training,
                           activation,
                           activation_param,
                           output_mask[0] ? dx.data_ptr() : nullptr,
                           output_mask[1] ? dresidual.data_ptr() : nullptr,
                           gradient_values(dweight, output_mask[2], "weight"),
                           gradient_values(dbias, output_mask[3], "bias")};
  cpu::backward(call, plan_here(problem, Pass::kBackward, bits != nullptr), parallel_for);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

PlanOverride& plan_override() {
  static PlanOverride forced;
  return forced;
}

CpuPlan plan_here(const Problem& problem, Pass pass, bool masked) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return plan_cpu(problem, pass, masked, threads, cpu::cache_sizes(), plan_override());
}

}  // namespace bindings
}  // namespace batchnorm

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  m.impl("forward_train", TORCH_FN(batchnorm::bindings::forward_train));
  m.impl("forward_eval", TORCH_FN(batchnorm::bindings::forward_eval));
  m.impl("eval_statistics", TORCH_FN(batchnorm::bindings::eval_statistics));
  m.impl("backward", TORCH_FN(batchnorm::bindings::backward));
}
