// Launches: what a device refuses, and who waits for whom.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "emulation.h"
#include "functions.h"
#include "host_api.h"
#include "machine.h"

namespace emulation {
namespace {

constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

thread_local cudaError_t last_error = cudaSuccess;
std::uint64_t launch_count = 0, refusals = 0;

std::uint64_t volume(dim3 dim) { return std::uint64_t{dim.x} * dim.y * dim.z; }

cudaError_t read_attributes(const cudaLaunchConfig_t& config, Launch& launch) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeCooperative:
        launch.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeClusterDimension:
        launch.cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
        break;
      case cudaLaunchAttributeIgnore:
        break;
      default:
        return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

cudaError_t check_dimensions(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool fits = volume(grid) > 0 && volume(block) > 0 && volume(block) <= 1024 &&
                    block.z <= 64 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// That these are refused is documented; which error a real device gives has not been compared.
cudaError_t check_cluster(const Device& device, const FunctionState& function,
                          const cudaLaunchConfig_t& config, dim3 cluster) {
  const std::uint64_t size = volume(cluster);
  if (size == 1) return cudaSuccess;
  if (!device.cluster_launch) return cudaErrorNotSupported;
  const unsigned largest = function.non_portable_cluster ? kLargestCluster : kPortableCluster;
  if (size == 0 || size > largest) return cudaErrorInvalidClusterSize;
  if (!device.odd_clusters && !std::has_single_bit(size)) return cudaErrorInvalidClusterSize;
  const dim3 grid = config.gridDim;
  const bool divides =
      grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
  return divides ? cudaSuccess : cudaErrorInvalidConfiguration;
}

cudaError_t check_resources(const Device& device, const FunctionState& function,
                            const cudaLaunchConfig_t& config, Launch& launch) {
  const std::size_t dynamic = config.dynamicSmemBytes;
  if (dynamic > function.dynamic_shared_limit) return cudaErrorInvalidValue;
  if (dynamic + function.static_shared > device.shared_per_block_optin) {
    return cudaErrorInvalidValue;
  }
  const auto threads = static_cast<unsigned>(volume(config.blockDim));
  const int blocks = resident_blocks(device, function, threads, dynamic);
  const auto multiprocessors = static_cast<std::size_t>(device.multiprocessors);
  const std::size_t cluster = volume(launch.cluster);
  const std::size_t resident = static_cast<std::size_t>(blocks) * multiprocessors;
  launch.resident_blocks = resident / cluster * cluster;
  if (launch.resident_blocks == 0) return cudaErrorInvalidConfiguration;
  if (!launch.cooperative) return cudaSuccess;
  if (!device.cooperative_launch) return cudaErrorNotSupported;
  const auto held =
      static_cast<std::size_t>(blocks) * static_cast<std::size_t>(device.held_multiprocessors);
  if (volume(config.gridDim) + held <= launch.resident_blocks) return cudaSuccess;
  ++refusals;
  return cudaErrorCooperativeLaunchTooLarge;
}

cudaError_t check(const cudaLaunchConfig_t& config, const FunctionState& function, Launch& launch) {
  const Device& device = device_state().device;
  cudaError_t error = read_attributes(config, launch);
  if (error == cudaSuccess) error = check_dimensions(config);
  if (error == cudaSuccess) error = check_cluster(device, function, config, launch.cluster);
  if (error == cudaSuccess) error = check_resources(device, function, config, launch);
  launch.code_architecture = device.architecture_of_code();
  launch.dynamic_shared = config.dynamicSmemBytes;
  launch.static_shared_limit = device.shared_per_block_optin - config.dynamicSmemBytes;
  return error;
}

}  // namespace

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body) {
  const std::lock_guard lock(device_mutex());
  FunctionState& function = device_state().functions[kernel];
  Launch launch;
  const cudaError_t error = check(config, function, launch);
  if (error != cudaSuccess) return record(error);
  launch.body = &body;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  ++launch_count;
  const std::size_t used = Machine::instance().run(launch);
  function.static_shared = std::max(function.static_shared, used);
  return cudaSuccess;
}

void set_seed(std::uint64_t seed) {
  const std::lock_guard lock(device_mutex());
  Machine::instance().seed(seed);
}

Counts counts() {
  const std::lock_guard lock(device_mutex());
  const Machine& machine = Machine::instance();
  return {launch_count, refusals, device_state().questions, machine.threads_run(),
          machine.switches()};
}

}  // namespace emulation

extern "C" {

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const std::lock_guard lock(emulation::device_mutex());
  ++emulation::device_state().questions;
  const emulation::FunctionState& function = emulation::device_state().functions[kernel];
  emulation::Launch launch;
  cudaLaunchConfig_t anywhere = *config;  // how many clusters fit at all, however large the grid
  cudaError_t error = emulation::read_attributes(*config, launch);
  launch.cooperative = false;
  if (error == cudaSuccess) {
    error = emulation::check_cluster(emulation::device_state().device, function, anywhere,
                                     launch.cluster);
  }
  if (error != cudaSuccess) return emulation::record(error);
  const auto size = emulation::volume(launch.cluster);
  error = emulation::check_resources(emulation::device_state().device, function, anywhere, launch);
  *clusters = error == cudaSuccess ? static_cast<int>(launch.resident_blocks / size) : 0;
  return cudaSuccess;
}

// A launch has ended when it returns, so there is nothing to wait for and all copies are immediate.

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return emulation::last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    default:
      return "an error that the emulation never gives";
  }
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

}  // extern "C"
