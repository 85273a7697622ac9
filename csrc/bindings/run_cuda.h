// CUDA calls with torch's memory: the same on a device and on the emulated one.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "bindings/planning.h"
#include "cuda/run.h"

namespace batchnorm {
namespace bindings {

// Memory of the stream's own: whoever gets it next comes later on the same stream.
class Workspace {
 public:
  template <typename Backend>
  Workspace(const Backend& backend, std::int64_t bytes) {
    if (bytes > 0) memory_ = backend.empty({bytes}, at::kByte);
  }
  void* data() const { return memory_.defined() ? memory_.data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

template <typename Backend, typename Call>
cudaError_t run_cuda(const Backend& backend, cuda::Device& device, cudaStream_t stream,
                     const Call& call) {
  return cuda::run(device, call, cuda_plan_override(), stream,
                   [&](std::int64_t bytes) { return Workspace(backend, bytes); });
}

template <typename Backend>
cudaError_t run_cuda(const Backend&, cuda::Device&, cudaStream_t stream,
                     const CombineMoments& call) {
  return cuda::combine_moments(call, stream);
}

}  // namespace bindings
}  // namespace batchnorm
