// A device at hand: its limits, and how much of it each kernel's blocks may have.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>

#include "core/plan_cuda.h"

namespace batchnorm {
namespace cuda {

// A kernel of forward or backward, and what it is compiled for.
struct Kernel {
  const void* function;  // as the driver knows it
  bool backward;
  DType dtype;
  Traversal traversal;
  bool smooth;

  static constexpr int kCount = 2 * 4 * 2 * 2 * 2;
  int index() const {
    int result = backward;
    result = 4 * result + static_cast<int>(dtype);
    result = 2 * result + static_cast<int>(traversal.mapping);
    result = 2 * result + static_cast<int>(traversal.access);
    return 2 * result + smooth;
  }
};

// Kept for as long as its kernels are launched; may be asked by several host threads. It must be
// the current device whenever it is asked.
class Device {
 public:
  // Once, before anything else.
  cudaError_t open(int device);
  const DeviceLimits& limits() const { return limits_; }

  // Also permits the kernel as much shared memory as a block can have. The driver is asked at the
  // kernel's first call; the answers take longer than a small call.
  cudaError_t occupancy_of(const Kernel& kernel, Occupancy* occupancy);

  // Whether this says that a cooperative launch did not fit: then the kernel is never again
  // launched so here. Nothing of it has run.
  bool was_refused(cudaError_t error, const Kernel& kernel);

 private:
  struct Entry {
    std::atomic<bool> is_known{false}, refused{false};
    Occupancy occupancy;  // does not change any more once it is known
  };

  DeviceLimits limits_ = {};
  std::mutex asking_;
  std::array<Entry, Kernel::kCount> entries_;
};

}  // namespace cuda
}  // namespace batchnorm
