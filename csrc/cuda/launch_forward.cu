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

ForwardKernel find_kernel(const ForwardTrain& call, const CudaPlan& plan) {
  return with_dtype(call.problem.dtype, [&](auto tag) {
    return forward_kernel_for<decltype(tag)>(plan.mapping, plan.access, is_smooth(call.activation));
  });
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

cudaError_t run(const ForwardTrain& call, bool training, const CudaPlan& plan, void* workspace,
                cudaStream_t stream) {
  const ForwardArguments arguments = {
      geometry_of(call.problem, plan), call, training, false, false, workspace};
  return launch_passes(find_kernel(call, plan), plan, stream, arguments);
}

}  // namespace

cudaError_t forward_train(const ForwardTrain& call, const CudaPlan& plan, void* workspace,
                          cudaStream_t stream) {
  return run(call, true, plan, workspace, stream);
}

cudaError_t forward_eval(const ForwardEval& call, const CudaPlan& plan, cudaStream_t stream) {
  return run(as_training(call), false, plan, nullptr, stream);
}

CudaRequest request_of(const ForwardTrain& call) { return request_for(call, true); }
CudaRequest request_of(const ForwardEval& call) { return request_for(as_training(call), false); }

}  // namespace cuda
}  // namespace batchnorm
