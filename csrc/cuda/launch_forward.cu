// Training and inference forward passes: from a call to its kernel.
#include "cuda/batchnorm.h"
#include "cuda/forward_kernels.cuh"
#include "cuda/launch.h"

namespace batchnorm {
namespace cuda {

extern template ForwardKernel forward_kernel_for<float>(Mapping, Access, bool);
extern template ForwardKernel forward_kernel_for<double>(Mapping, Access, bool);
extern template ForwardKernel forward_kernel_for<BFloat16>(Mapping, Access, bool);
extern template ForwardKernel forward_kernel_for<Half>(Mapping, Access, bool);

namespace {

ForwardKernel find_kernel(DType dtype, const Traversal& traversal, bool smooth) {
  return with_dtype(dtype, [&](auto tag) {
    return forward_kernel_for<decltype(tag)>(traversal.mapping, traversal.access, smooth);
  });
}

Kernel kernel_for(DType dtype, const Traversal& traversal, bool smooth) {
  return {address_of(find_kernel(dtype, traversal, smooth)), false, dtype, traversal, smooth};
}

// Inference is training without what training writes.
ForwardTrain as_training(const ForwardEval& call) {
  ForwardTrain result = {};
  result.problem = call.problem;
  result.x = call.x;
  result.residual = call.residual;
  result.y = call.y;
  result.mask = call.mask;
  result.weight = call.weight;
  result.bias = call.bias;
  result.running.mean = call.running_mean;
  result.running.var = call.running_var;
  result.eps = call.eps;
  result.activation = call.activation;
  result.activation_param = call.activation_param;
  return result;
}

CudaRequest request_for(const ForwardTrain& call, bool training) {
  return {call.problem,
          training ? Pass::kForward : Pass::kEval,
          training,
          training && call.running.cumulative_average && call.running.num_batches_tracked,
          are_aligned(call.x, call.residual, call.y),
          call.residual != nullptr,
          call.mask != nullptr,
          call.y ? 1 : 0};
}

cudaError_t launch_forward(const ForwardTrain& call, bool training, const CudaPlan& plan,
                           void* workspace, cudaStream_t stream) {
  const ForwardArguments arguments = {
      geometry_of(call.problem, plan), call, training, false, false, workspace};
  const ForwardKernel kernel =
      find_kernel(call.problem.dtype, {plan.mapping, plan.access}, is_smooth(call.activation));
  return launch_passes(kernel, plan, stream, arguments);
}

}  // namespace

cudaError_t enqueue(const ForwardTrain& call, const CudaPlan& plan, void* workspace,
                    cudaStream_t stream) {
  return launch_forward(call, true, plan, workspace, stream);
}
cudaError_t enqueue(const ForwardEval& call, const CudaPlan& plan, void* workspace,
                    cudaStream_t stream) {
  return launch_forward(as_training(call), false, plan, workspace, stream);
}

Kernel kernel_of(const ForwardTrain& call, const Traversal& traversal) {
  return kernel_for(call.problem.dtype, traversal, is_smooth(call.activation));
}
Kernel kernel_of(const ForwardEval& call, const Traversal& traversal) {
  return kernel_for(call.problem.dtype, traversal, is_smooth(call.activation));
}

CudaRequest request_of(const ForwardTrain& call) { return request_for(call, true); }
CudaRequest request_of(const ForwardEval& call) { return request_for(as_training(call), false); }

}  // namespace cuda
}  // namespace batchnorm
