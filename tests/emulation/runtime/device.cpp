// Questions about the emulated device and its functions, as CUDA's host API answers them.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <exception>

#include "emulation.h"
#include "functions.h"

namespace emulation {
namespace {

constexpr int kRegistersPerMultiprocessor = 64 << 10;
constexpr int kThreadsPerBlock = 1024;

const Device& device() { return device_state().device; }

}  // namespace

Device Device::turing() {
  Device device;
  device.compute_major = 7;
  device.compute_minor = 5;
  device.threads_per_multiprocessor = 1024;
  device.blocks_per_multiprocessor = 16;
  device.shared_per_block_optin = 64 << 10;
  device.shared_per_multiprocessor = 64 << 10;
  device.reserved_shared_per_block = 0;
  device.l2_bytes = 4 << 20;
  device.cluster_launch = false;
  return device;
}

Device Device::ampere() {
  Device device;
  device.compute_major = 8;
  device.shared_per_block_optin = 163 << 10;
  device.shared_per_multiprocessor = 164 << 10;
  device.l2_bytes = 40 << 20;
  device.cluster_launch = false;
  return device;
}

std::mutex& device_mutex() {
  static std::mutex mutex;
  return mutex;
}

DeviceState& device_state() {
  static DeviceState state;
  return state;
}

void set_device(const Device& device) {
  const std::lock_guard lock(device_mutex());
  device_state() = DeviceState{device, {}, device_state().questions};
}

Device current_device() {
  const std::lock_guard lock(device_mutex());
  return device();
}

int resident_blocks(const Device& device, const FunctionState& function, unsigned threads,
                    std::size_t dynamic_shared) {
  if (threads == 0 || threads > kThreadsPerBlock) return 0;
  if (dynamic_shared > function.dynamic_shared_limit) return 0;
  const std::size_t in_block = dynamic_shared + function.static_shared;
  if (in_block > device.shared_per_block_optin) return 0;
  const std::size_t shared = in_block + device.reserved_shared_per_block;
  const int whole_warps = static_cast<int>((threads + 31) / 32 * 32);
  int blocks =
      std::min(device.blocks_per_multiprocessor, device.threads_per_multiprocessor / whole_warps);
  blocks =
      std::min(blocks, kRegistersPerMultiprocessor / (device.registers_per_thread * whole_warps));
  if (shared == 0) return blocks;
  return std::min(blocks, static_cast<int>(device.shared_per_multiprocessor / shared));
}

namespace {

bool attribute(const Device& device, cudaDeviceAttr which, std::size_t& value) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      value = static_cast<std::size_t>(device.multiprocessors);
      return true;
    case cudaDevAttrComputeCapabilityMajor:
      value = static_cast<std::size_t>(device.compute_major);
      return true;
    case cudaDevAttrComputeCapabilityMinor:
      value = static_cast<std::size_t>(device.compute_minor);
      return true;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      value = static_cast<std::size_t>(device.threads_per_multiprocessor);
      return true;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      value = static_cast<std::size_t>(device.blocks_per_multiprocessor);
      return true;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      value = device.shared_per_block_optin;
      return true;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      value = device.shared_per_multiprocessor;
      return true;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      value = device.reserved_shared_per_block;
      return true;
    case cudaDevAttrL2CacheSize:
      value = device.l2_bytes;
      return true;
    case cudaDevAttrCooperativeLaunch:
      value = device.cooperative_launch ? 1 : 0;
      return true;
    case cudaDevAttrClusterLaunch:
      value = device.cluster_launch ? 1 : 0;
      return true;
    default:
      return false;
  }
}

// The same on every device.
bool constant_attribute(cudaDeviceAttr which, std::size_t& value) {
  switch (which) {
    case cudaDevAttrWarpSize:
      value = 32;
      return true;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      value = kThreadsPerBlock;
      return true;
    case cudaDevAttrMaxBlockDimZ:
      value = 64;
      return true;
    case cudaDevAttrMaxGridDimX:
      value = 0x7fffffff;
      return true;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      value = 65535;
      return true;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      value = 48 << 10;
      return true;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      value = kRegistersPerMultiprocessor;
      return true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace emulation

using emulation::device_mutex;
using emulation::device_state;
using emulation::FunctionState;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : emulation::record(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device != 0) return emulation::record(cudaErrorInvalidDevice);
  const std::lock_guard lock(device_mutex());
  std::size_t found = 0;
  if (!emulation::attribute(device_state().device, which, found) &&
      !emulation::constant_attribute(which, found)) {
    return emulation::record(cudaErrorInvalidValue);
  }
  *value = static_cast<int>(found);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(device_mutex());
  ++device_state().questions;
  FunctionState& function = device_state().functions[kernel];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize: {
      const std::size_t most = device_state().device.shared_per_block_optin;
      if (value < 0 || static_cast<std::size_t>(value) + function.static_shared > most) {
        return emulation::record(cudaErrorInvalidValue);
      }
      function.dynamic_shared_limit = static_cast<std::size_t>(value);
      return cudaSuccess;
    }
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      function.non_portable_cluster = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return value >= -1 && value <= 100 ? cudaSuccess : emulation::record(cudaErrorInvalidValue);
    default:
      return emulation::record(cudaErrorInvalidValue);
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const std::lock_guard lock(device_mutex());
  ++device_state().questions;
  const FunctionState& function = device_state().functions[kernel];
  const emulation::Device& device = device_state().device;
  *attributes = {};
  attributes->sharedSizeBytes = function.static_shared;
  attributes->maxThreadsPerBlock = emulation::kThreadsPerBlock;
  attributes->numRegs = device.registers_per_thread;
  attributes->binaryVersion = device.compute_major * 10 + device.compute_minor;
  attributes->ptxVersion = device.architecture_of_code();
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(function.dynamic_shared_limit);
  return cudaSuccess;
}

// The host's memory, aligned as a device's.
cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  constexpr std::size_t kAlignment = 256;
  const std::size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  *address = bytes > 0 ? std::aligned_alloc(kAlignment, whole) : nullptr;
  const bool failed = bytes > 0 && !*address;
  return failed ? emulation::record(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, std::size_t dynamic_shared) {
  if (threads <= 0) return emulation::record(cudaErrorInvalidValue);
  const std::lock_guard lock(device_mutex());
  ++device_state().questions;
  *blocks = emulation::resident_blocks(device_state().device, device_state().functions[kernel],
                                       static_cast<unsigned>(threads), dynamic_shared);
  return cudaSuccess;
}

}  // extern "C"
