// The operators on CPU tensors: allocation, and the call on torch's threads.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "bindings/operators.h"
#include "bindings/planning.h"
#include "bindings/pool.h"
#include "cpu/batchnorm.h"

namespace batchnorm {
namespace bindings {
namespace {

void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
  at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) body(i);
  });
}

// Smaller blocks stay in the C library's own memory. From here on glibc has each mapped, until it
// has seen larger ones freed, which with a pool it may never do. Not measured against other sizes.
constexpr std::size_t kFromPool = 128 << 10;

// From here on glibc maps each block anew, whatever it has seen freed. Smaller ones are often there
// already, and huge pages made no difference beyond noise (docs/decisions/0004).
constexpr std::size_t kMappedAnew = 32 << 20;

// What resize_, share_memory_ and their like do to an output's memory goes through here, too.
struct PoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const bool pooled = bytes >= kFromPool && output_pool().limit() > 0;
    void* const memory = pooled ? output_pool().allocate(bytes) : nullptr;
    if (!memory) return from_torch(bytes);
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, memory, &release, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  // With torch's error where there is no memory.
  static c10::DataPtr from_torch(std::size_t bytes) {
    c10::DataPtr block = c10::GetCPUAllocator()->allocate(bytes);
    if (bytes >= kMappedAnew) cpu::ask_for_huge_pages(block.get(), bytes);
    return block;
  }
  static void release(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    output_pool().release(memory);
  }
};

// Whoever chose an allocator for the process has it for outputs, too.
bool has_allocator_of_its_own() {
  if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) return true;
#if defined(__linux__)
  for (const char* const name : {"mallctl", "tc_version", "mi_version"}) {
    if (dlsym(RTLD_DEFAULT, name)) return true;
  }
#endif
  return false;
}

// Allocation without the dispatcher, which takes longer than the kernels do on a small tensor.
struct CpuBackend {
  static constexpr bool kHostMemory = true;

  explicit CpuBackend(const at::Tensor&) {}

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::Tensor(at::detail::empty_cpu(sizes, dtype));
  }
  // Of inference, whose output is soon gone: in what another operator has just freed, and left in a
  // cache. From the pool, a ResNet-50 in eval mode takes 1.01 to 1.02 of the time. Outputs that no
  // cache holds are mapped anew, though: (12, 64, 112, 112) took 2.2 to 3.5 ms, from the pool 1.0
  // to 1.6.
  at::Tensor empty_passing(const at::Tensor& like) const {
    if (like.nbytes() >= kMappedAnew) return empty_output(like);
    return at::Tensor(
        at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
  }
  at::Tensor empty_output(const at::Tensor& like) const {
    static PoolAllocator allocator;
    return at::Tensor(at::detail::empty_strided_generic(like.sizes(), like.strides(), &allocator,
                                                        c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                        like.scalar_type()));
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

// Never destroyed: outputs may outlive what a process destroys at its end.
cpu::Pool& output_pool() {
  static cpu::Pool* const pool = [] {
    auto* const made = new cpu::Pool(has_allocator_of_its_own() ? 0 : cpu::Pool::kNoLimit);
#if defined(__linux__)
    pthread_atfork([] { output_pool().before_fork(); }, [] { output_pool().after_fork(false); },
                   [] { output_pool().after_fork(true); });
#endif
    return made;
  }();
  return *pool;
}

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
