// What the driver knows of a device and of the kernels on it.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/occupancy.h"

namespace batchnorm {
namespace cuda {
namespace {

// Compiled as all others are.
__global__ void some_kernel() {}

// Device code of compute capability 9.0 and newer has clusters. On such a device runs older code,
// too: what the driver compiles of PTX for 8.0 has none.
constexpr int kFirstWithClusters = 90;

cudaError_t largest_cluster(bool device_has_clusters, int* size) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, some_kernel);
  const bool has_clusters = device_has_clusters && attributes.ptxVersion >= kFirstWithClusters;
  *size = has_clusters ? kLargestCluster : 1;
  return error;
}

// Set to the same by all host threads, and never lowered: a launch with less than is permitted is
// as good as any, one with more is refused.
cudaError_t permit_shared_memory(const void* kernel, const DeviceLimits& limits) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const auto most = limits.shared_per_block - static_cast<std::int64_t>(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(most));
}

// 0 where the driver refuses the size, with whichever error: a plan can do without.
int clusters_at_once(const void* kernel, int size, std::int64_t shared) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(kCudaThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
  (void)cudaGetLastError();
  return 0;
}

// No more than the plan counts on; at least the one block that any kernel is compiled for.
cudaError_t ask(const Kernel& kernel, const DeviceLimits& limits, Occupancy* occupancy) {
  cudaError_t error = permit_shared_memory(kernel.function, limits);
  if (error != cudaSuccess) return error;
  const Occupancy assumed = assumed_occupancy(kernel.dtype, limits);
  int blocks = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, kernel.function, kCudaThreads,
      static_cast<std::size_t>(shared_room(limits, assumed.blocks)));
  occupancy->blocks = std::clamp(blocks, 1, assumed.blocks);
  const std::int64_t shared = shared_room(limits, occupancy->blocks);
  for (int size = 2; size <= limits.max_cluster; ++size) {
    occupancy->clusters[size] = clusters_at_once(kernel.function, size, shared);
  }
  return error;
}

}  // namespace

cudaError_t Device::open(int device) {
  cudaError_t error = cudaSuccess;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  limits_.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                               attribute(cudaDevAttrComputeCapabilityMinor);
  limits_.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits_.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  limits_.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits_.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits_.reserved_shared = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  limits_.l2 = attribute(cudaDevAttrL2CacheSize);
  limits_.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  const bool has_clusters = attribute(cudaDevAttrClusterLaunch) != 0;
  return error != cudaSuccess ? error : largest_cluster(has_clusters, &limits_.max_cluster);
}

cudaError_t Device::occupancy_of(const Kernel& kernel, Occupancy* occupancy) {
  Entry& entry = entries_[kernel.index()];
  if (!entry.is_known.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(asking_);
    if (!entry.is_known.load(std::memory_order_relaxed)) {
      const cudaError_t error = ask(kernel, limits_, &entry.occupancy);
      if (error != cudaSuccess) return error;
      entry.is_known.store(true, std::memory_order_release);
    }
  }
  *occupancy = entry.occupancy;
  occupancy->refused = entry.refused.load(std::memory_order_relaxed);
  return cudaSuccess;
}

bool Device::was_refused(cudaError_t error, const Kernel& kernel) {
  if (error != cudaErrorCooperativeLaunchTooLarge) return false;
  (void)cudaGetLastError();  // not the next one's who asks
  entries_[kernel.index()].refused.store(true, std::memory_order_relaxed);
  return true;
}

}  // namespace cuda
}  // namespace batchnorm
