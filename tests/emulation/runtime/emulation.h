// What a test says to the emulated device: which one it is, in which order threads run, and what
// goes wrong. Kernels and launchers need nothing of this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace emulation {

// A kernel broke a rule of the execution model: a divergent barrier, a deadlock, too much shared
// memory. cudaLaunchKernelEx throws it, so a launcher under emulation must not be noexcept.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The limits that launches are checked against and planners ask for. By default those of a GH100
// with few multiprocessors: a cooperative launch that fills the device still takes milliseconds.
struct Device {
  int multiprocessors = 8;
  int compute_major = 9;
  int compute_minor = 0;
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
  std::size_t shared_per_block_optin = 227 << 10;
  std::size_t shared_per_multiprocessor = 228 << 10;
  std::size_t reserved_shared_per_block = 1 << 10;
  std::size_t l2_bytes = 50 << 20;
  bool cooperative_launch = true;
  bool cluster_launch = true;
  bool odd_clusters = true;       // also those that are no power of two
  int registers_per_thread = 32;  // of every kernel
  // What kernels were compiled for, 80 for 8.0; 0 is the device itself. An older one's code is
  // compiled anew by the driver, but not for more than it asks for.
  int code_architecture = 0;
  // Others have so many multiprocessors to themselves. Occupancy leaves them out of account, and a
  // cooperative launch that needs them is refused.
  int held_multiprocessors = 0;

  int architecture_of_code() const {
    return code_architecture > 0 ? code_architecture : compute_major * 10 + compute_minor;
  }

  // Compute capability 7.5: 64 KiB of shared memory, 1024 threads a multiprocessor, no clusters.
  static Device turing();
  // Compute capability 8.0: 163 KiB of shared memory for a block, no clusters.
  static Device ampere();
};

// Both are for all launches that follow. set_device forgets the functions' attributes, too.
void set_device(const Device& device);
Device current_device();

// The same seed gives the same order of blocks and threads again.
void set_seed(std::uint64_t seed);

// What has happened since the program started.
struct Counts {
  std::uint64_t launches = 0;
  std::uint64_t refusals = 0;   // cooperative launches that were too large
  std::uint64_t questions = 0;  // of occupancy and functions, and what was set of them
  std::uint64_t threads = 0;
  std::uint64_t switches = 0;  // how often a thread was given the processor
};
Counts counts();

}  // namespace emulation
