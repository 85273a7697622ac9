// The operators on CPU tensors: allocation, and the call on torch's threads.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/operators.h"
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
struct CpuBackend {
  explicit CpuBackend(const at::Tensor&) {}

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::Tensor(at::detail::empty_cpu(sizes, dtype));
  }
  at::Tensor empty_output(const at::Tensor& like) const {
    at::Tensor output(
        at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
    ask_for_huge_pages(output);
    return output;
  }
  void run(const ForwardTrain& call) const {
    cpu::forward_train(call, plan_here(call.problem, Pass::kForward, call.mask), parallel_for);
  }
  void run(const ForwardEval& call) const {
    cpu::forward_eval(call, plan_here(call.problem, Pass::kEval, call.mask), parallel_for);
  }
  void run(const Backward& call) const {
    cpu::backward(call, plan_here(call.problem, Pass::kBackward, call.mask), parallel_for);
  }
  bool may_wait() const { return true; }
  void run(const CombineMoments& call) const { cpu::combine_moments(call); }
  void eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                       double eps, std::int64_t c, double* mean, double* invstd) const {
    cpu::eval_statistics(running_mean, running_var, eps, c, mean, invstd);
  }
};

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
  batchnorm::bindings::register_operators<batchnorm::bindings::CpuBackend>(m);
}
