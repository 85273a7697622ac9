// The backward pass: from a call to its kernel.
#include "cuda/backward_kernels.cuh"
#include "cuda/batchnorm.h"
#include "cuda/launch.h"

namespace batchnorm {
namespace cuda {

extern template BackwardKernel backward_kernel_for<float>(Mapping, Access, bool);
extern template BackwardKernel backward_kernel_for<double>(Mapping, Access, bool);
extern template BackwardKernel backward_kernel_for<BFloat16>(Mapping, Access, bool);
extern template BackwardKernel backward_kernel_for<Half>(Mapping, Access, bool);

namespace {

BackwardKernel find_kernel(const Backward& call, const Traversal& traversal) {
  return with_dtype(call.problem.dtype, [&](auto tag) {
    return backward_kernel_for<decltype(tag)>(traversal.mapping, traversal.access,
                                              is_smooth(call.activation));
  });
}

}  // namespace

cudaError_t enqueue(const Backward& call, const CudaPlan& plan, void* workspace,
                    cudaStream_t stream) {
  const BackwardArguments arguments = {geometry_of(call.problem, plan), call, false, false,
                                       workspace};
  return launch_passes(find_kernel(call, {plan.mapping, plan.access}), plan, stream, arguments);
}

Kernel kernel_of(const Backward& call, const Traversal& traversal) {
  return {address_of(find_kernel(call, traversal)), true, call.problem.dtype, traversal,
          is_smooth(call.activation)};
}

CudaRequest request_of(const Backward& call) {
  return {call.problem,
          Pass::kBackward,
          call.reduces(),
          false,
          are_aligned(call.dy, call.x, call.residual, call.dx, call.dresidual),
          call.residual != nullptr,
          call.mask != nullptr,
          (call.dx ? 1 : 0) + (call.dresidual ? 1 : 0)};
}

}  // namespace cuda
}  // namespace batchnorm
