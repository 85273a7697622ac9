// What the programs that test the emulation share.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

struct Shape {
  dim3 grid = dim3(1, 1, 1);
  dim3 block = dim3(32, 1, 1);
  dim3 cluster = dim3(0, 0, 0);  // none asked for
  bool cooperative = false;
  std::size_t dynamic_shared = 0;
};

template <typename Kernel, typename... Arguments>
cudaError_t launch(const Shape& shape, Kernel* kernel, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.dynamic_shared;
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster.x > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster.x, shape.cluster.y,
                                                    shape.cluster.z};
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}
