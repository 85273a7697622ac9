// A call from its request to its launch.
#pragma once

#include "cuda/batchnorm.h"
#include "cuda/occupancy.h"

namespace batchnorm {
namespace cuda {

// Plans the call for the device, which is the current one and the stream's, and launches it.
// allocate(bytes) gives an object that holds the workspace, with its address as data(): nullptr
// for none.
template <typename Call, typename Allocate>
cudaError_t run(Device& device, const Call& call, const CudaPlanOverride& forced,
                cudaStream_t stream, const Allocate& allocate) {
  const CudaRequest request = request_of(call);
  const Kernel kernel = kernel_of(call, traversal_of(request, forced));
  Occupancy occupancy;
  const cudaError_t error = device.occupancy_of(kernel, &occupancy);
  if (error != cudaSuccess) return error;
  const auto attempt = [&] {
    const CudaPlan plan = plan_cuda(request, device.limits(), occupancy, forced);
    const auto workspace = allocate(plan.workspace_bytes);
    return enqueue(call, plan, workspace.data(), stream);
  };
  const cudaError_t first = attempt();
  if (!device.was_refused(first, kernel)) return first;
  occupancy.refused = true;
  return attempt();
}

}  // namespace cuda
}  // namespace batchnorm
