// The device that the kernels run on, as the checks see it. The linker decides which one it is:
// emulated_device.cpp is the emulation, real_device.cpp whatever the CUDA runtime finds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "cuda/occupancy.h"

namespace check {

struct Case;

// Bytes with two addresses: the checks read and write at host(), kernels get device(). Where the
// two are not the same memory, call() copies.
class Memory {
 public:
  explicit Memory(std::size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  unsigned char* host() const { return host_; }
  unsigned char* device() const { return device_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  unsigned char *host_, *device_;
};

// After this error no kernel runs any more in this process.
class DeviceLost : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Calls a launcher and waits for its kernels. They find all Memory as the host left it, and the
// host finds it as they left it. Returns the launcher's error, or that of its kernels; throws
// DeviceLost, or std::runtime_error where kernels broke a rule.
cudaError_t call(const std::function<cudaError_t()>& launcher);

// What the host wrote to memory that a launcher allocates, while it is called.
void send(const Memory& memory);

// Readies the device for a case, and names it there. Why it cannot run it, or "".
std::string set_up(Case* c);

// As set_up left it. A program opens its device once, and so is it for a case.
batchnorm::cuda::Device& opened();

// What the device's driver was asked, and refused, so far; 0 where nobody counts.
struct Driver {
  std::uint64_t refusals, questions;
};
Driver driver();

// Has threads and blocks run in another order from here on, where that can be chosen.
void set_order(std::uint64_t seed);

}  // namespace check
