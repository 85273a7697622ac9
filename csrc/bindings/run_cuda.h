// A CUDA call from its request to its launch: the same on a device and on the emulated one.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "bindings/planning.h"
#include "core/plan_cuda.h"
#include "cuda/batchnorm.h"

namespace batchnorm {
namespace bindings {

// Memory of the stream's own: whoever gets it next comes later on the same stream.
template <typename Backend>
class Workspace {
 public:
  Workspace(const Backend& backend, std::int64_t bytes) {
    if (bytes > 0) memory_ = backend.empty({bytes}, at::kByte);
  }
  void* data() const { return memory_.defined() ? memory_.data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

template <typename Call>
CudaPlan plan_on(const DeviceLimits& device, const Call& call) {
  return plan_cuda(cuda::request_of(call), device, cuda_plan_override());
}

template <typename Backend>
cudaError_t run_cuda(const Backend& backend, const DeviceLimits& device, cudaStream_t stream,
                     const ForwardTrain& call) {
  const CudaPlan plan = plan_on(device, call);
  const Workspace workspace(backend, plan.workspace_bytes);
  return cuda::forward_train(call, plan, workspace.data(), stream);
}

template <typename Backend>
cudaError_t run_cuda(const Backend&, const DeviceLimits& device, cudaStream_t stream,
                     const ForwardEval& call) {
  return cuda::forward_eval(call, plan_on(device, call), stream);
}

template <typename Backend>
cudaError_t run_cuda(const Backend& backend, const DeviceLimits& device, cudaStream_t stream,
                     const Backward& call) {
  const CudaPlan plan = plan_on(device, call);
  const Workspace workspace(backend, plan.workspace_bytes);
  return cuda::backward(call, plan, workspace.data(), stream);
}

template <typename Backend>
cudaError_t run_cuda(const Backend&, const DeviceLimits&, cudaStream_t stream,
                     const CombineMoments& call) {
  return cuda::combine_moments(call, stream);
}

}  // namespace bindings
}  // namespace batchnorm
