// The one way to launch a kernel: always checked, by cudaLaunchKernelEx.
#pragma once

#include <cuda_runtime.h>

#include "core/plan_cuda.h"

namespace batchnorm {
namespace cuda {

// A kernel with the plan's blocks and shared memory; in clusters or cooperatively as it says. More
// than 48 KiB of shared memory were permitted when the kernel's occupancy was asked.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), const CudaPlan& plan, cudaStream_t stream,
                   const Arguments& arguments) {
  cudaLaunchAttribute attributes[1] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks()));
  config.blockDim = dim3(kCudaThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (plan.strategy == Strategy::kGrid) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  } else if (plan.strategy == Strategy::kCluster) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(plan.team);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// The launches that a plan means: arguments.reduce and .apply are set for each.
template <typename Arguments>
cudaError_t launch_passes(void (*kernel)(Arguments), const CudaPlan& plan, cudaStream_t stream,
                          Arguments arguments) {
  arguments.reduce = plan.strategy != Strategy::kSinglePass;
  arguments.apply = plan.strategy != Strategy::kTwoKernels;
  cudaError_t error = launch(kernel, plan, stream, arguments);
  if (error != cudaSuccess || arguments.apply) return error;
  arguments.reduce = false;
  arguments.apply = true;
  return launch(kernel, plan, stream, arguments);
}

template <typename Arguments>
const void* address_of(void (*kernel)(Arguments)) {
  return reinterpret_cast<const void*>(kernel);
}

inline bool is_smooth(Activation activation) {
  return !is_piecewise_linear(activation) && activation != Activation::kIdentity;
}

// Whether 16-byte accesses of all tensors are possible; null pointers are not in the way.
template <typename... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace cuda
}  // namespace batchnorm
