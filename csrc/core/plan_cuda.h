// How a CUDA call is cut into work: the only place with thresholds. Pure integers in, plan out.
//
// A unit (a channel, or a group of channels that share memory lines) is reduced, then written. A
// team of blocks works on a unit. Each thread handles cells of 8 neighbouring elements; the first
// `slots` cells of each thread stay in shared memory between the two passes, the others are read
// again, last ones first.
#pragma once

#include <array>
#include <cstdint>

#include "core/plan.h"
#include "core/types.h"

namespace batchnorm {

// What is asked of a device. cuda::Device reads it from the one at hand.
struct DeviceLimits {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int threads_per_multiprocessor;
  std::int64_t shared_per_block;  // bytes that a block may ask for
  std::int64_t shared_per_multiprocessor;
  std::int64_t reserved_shared;  // bytes that each block costs besides
  std::int64_t l2;               // bytes
  int max_cluster;               // blocks; 1 where there are no clusters
  bool cooperative;              // a grid barrier is possible
};

// What a kernel finds on a device. cuda::Device asks the driver; assumed_occupancy() is for devices
// that are not at hand.
constexpr int kLargestCluster = 8;  // that every device with clusters takes
struct Occupancy {
  int blocks = 0;  // on a multiprocessor at once, each with all the shared memory it may have
  // By their size: clusters on the device at once, 0 where it doesn't take them.
  std::array<int, kLargestCluster + 1> clusters = {};
  bool refused = false;  // a cooperative launch that should have fitted: others hold the device
};

// kPlanes   channels-first: a unit is one channel; a cell lies within one plane.
// kColumns  a unit is a matrix of `rows` rows, its columns belong to channels. Channels-last: a
//           column is a channel. Channels-first with small planes: a row is the planes of
//           unit_channels neighbouring channels for one n.
enum class Mapping : std::uint8_t { kPlanes, kColumns };

// kVector: 16-byte loads and stores. kScalar: one element at a time, for any size and alignment.
enum class Access : std::uint8_t { kVector, kScalar };

// Who reduces a unit, and how the blocks of a team meet between the two passes.
enum class Strategy : std::uint8_t {
  kBlock,       // one block, by its own barrier
  kCluster,     // a thread-block cluster, by its barrier and distributed shared memory
  kGrid,        // as many blocks as the device holds, by the grid's barrier; all units in waves
  kTwoKernels,  // any number of blocks, by the end of a first kernel; nothing stays on chip
  kSinglePass,  // nothing to reduce
};
constexpr const char* kStrategyNames[] = {"block", "cluster", "grid", "two_kernels", "single_pass"};

constexpr int kCudaThreads = 256;  // of every block
constexpr int kCellElements = 8;   // whole bytes of the mask, 16 bytes of the 16-bit dtypes
constexpr int kPartialValues = 3;  // two sums and a count for each channel: what a team exchanges
constexpr int kFinalValues = 5;    // for each channel: what the second pass needs

struct CudaRequest {
  Problem problem;
  Pass pass;
  bool reduces;     // false: eval, and backward where no sum is needed
  bool cumulative;  // momentum=None: the counter is read by all and written by one
  bool aligned;     // every tensor starts at a multiple of 16 bytes
  bool residual;    // is read
  bool masked;      // a mask is written (forward) or read (backward)
  int outputs;      // tensors written: y; dx, dresidual
};

// What a kernel is compiled for: by the call alone, so that the kernel is known before its plan.
struct Traversal {
  Mapping mapping;
  Access access;
};

struct CudaPlan {
  Mapping mapping;
  Access access;
  Strategy strategy;
  int team;                    // blocks for each unit
  int slots;                   // cells of each thread that stay in shared memory
  bool stream_stores;          // stores that ask to leave the second-level cache first
  bool refused;                // made without cooperation, since a launch with it was refused
  std::int64_t unit_channels;  // at most kCudaThreads; the last unit may have fewer
  std::int64_t units;
  std::int64_t units_at_once;  // of a wave; kGrid alone has several waves
  std::int64_t shared_bytes;   // of a block
  std::int64_t workspace_bytes;
  std::int64_t compulsory_bytes;  // that cross device memory if nothing is read twice
  std::int64_t predicted_bytes;   // with what is read again, caches left out

  std::int64_t blocks() const { return units_at_once * team; }
};

// What a test or a measurement may prescribe; -1 leaves a field to the planner. A field that the
// call cannot follow (a cluster on a device without, vectors of unaligned tensors) is left too.
struct CudaPlanOverride {
  int strategy = -1;
  int access = -1;
  int team = -1;
  int slots = -1;
  std::int64_t unit_channels = -1;
  std::int64_t units_at_once = -1;
  int stream_stores = -1;
};

// By the problem alone, since the mask that forward writes is laid out as backward reads it: the
// channels whose planes are reduced together as columns, or 0 where planes are walked one by one.
std::int64_t expanded_channels(const Problem& problem);

// The matrix of a unit (kColumns).
BATCHNORM_HOST_DEVICE inline std::int64_t columns_per_channel(const Problem& p) {
  return p.layout == Layout::kChannelsFirst ? p.s : 1;
}
inline std::int64_t matrix_rows(const Problem& p) {
  return p.layout == Layout::kChannelsFirst ? p.n : p.n * p.s;
}

// A block's shared memory behind the slots, in values of the accumulate type.
struct CudaScratch {
  int tree;      // values of the reduction among threads
  int partials;  // kPartialValues for each channel of the unit
  int finals;    // kFinalValues for each channel
  int counts;    // of the threads that write to the tree at a time

  constexpr std::int64_t bytes(int accumulate_size) const {
    return static_cast<std::int64_t>(tree + partials + finals + counts) * accumulate_size;
  }
};
BATCHNORM_HOST_DEVICE inline CudaScratch cuda_scratch(const Problem& p, Mapping mapping,
                                                      std::int64_t unit_channels) {
  constexpr std::int64_t kHalf = kCudaThreads / 2;
  const std::int64_t width =
      mapping == Mapping::kPlanes ? 1 : unit_channels * columns_per_channel(p);
  const std::int64_t cells = (width + kCellElements - 1) / kCellElements;
  const std::int64_t threads = cells > kHalf ? cells : kHalf;
  const std::int64_t lanes = mapping == Mapping::kPlanes ? 1 : kCellElements;
  return {static_cast<int>(2 * lanes * threads), static_cast<int>(kPartialValues * unit_channels),
          static_cast<int>(kFinalValues * unit_channels), static_cast<int>(kHalf)};
}

// Whether the blocks of a team share out the unit's channels, each sums up its own and they meet
// once more, before all read the totals. Else each block reads all partial results. More than 2
// loads for each of its threads take as long as a barrier: 512 are 50 KB, since each is of 3 values
// in a piece of 32 bytes, at the 20 bytes per nanosecond that a block has of 5 TB/s.
constexpr std::int64_t kPartialsForEach = 2 * kCudaThreads;
BATCHNORM_HOST_DEVICE constexpr bool shares_out(Strategy strategy, std::int64_t team,
                                                std::int64_t unit_channels) {
  return strategy == Strategy::kGrid && team * unit_channels > kPartialsForEach;
}

Traversal traversal_of(const CudaRequest& request, const CudaPlanOverride& forced);

// Bytes that each of so many blocks on a multiprocessor may ask for.
std::int64_t shared_room(const DeviceLimits& device, int blocks);

// What the kernels of a dtype are compiled for, and clusters wherever blocks are.
Occupancy assumed_occupancy(DType dtype, const DeviceLimits& device);

CudaPlan plan_cuda(const CudaRequest& request, const DeviceLimits& device,
                   const Occupancy& occupancy, const CudaPlanOverride& forced);

}  // namespace batchnorm
