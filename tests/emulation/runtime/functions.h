// The emulated device's limits, and what has been set and seen of each kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "emulation.h"

namespace emulation {

// Of one kernel, by the address of its host function.
struct FunctionState {
  // What cudaFuncAttributeMaxDynamicSharedMemorySize was set to; before, what needs no permission.
  std::size_t dynamic_shared_limit = 48 << 10;
  bool non_portable_cluster = false;
  // How much a compiler would have counted. Here it shows when the kernel runs: 0 before.
  std::size_t static_shared = 0;
};

struct DeviceState {
  Device device;
  std::map<const void*, FunctionState> functions;
  std::uint64_t questions = 0;  // Counts
};

// One launch or question at a time. Kernels launch no kernels, so it is never taken twice.
std::mutex& device_mutex();
// Only while the mutex is held.
DeviceState& device_state();

// Keeps an error for cudaGetLastError, and returns it.
cudaError_t record(cudaError_t error);

// How many blocks of the kernel fit on a multiprocessor.
int resident_blocks(const Device& device, const FunctionState& function, unsigned threads,
                    std::size_t dynamic_shared);

}  // namespace emulation
