// Takes the place of CUDA's <cooperative_groups.h>: the groups that a block, cluster or grid
// barrier needs. There are no tiles: kernels use the warp intrinsics.
#pragma once

#include "device_language.h"

namespace cooperative_groups {

class thread_block {
 public:
  static void sync(emulation::Place place = emulation::Place::current()) { __syncthreads(place); }
  static unsigned thread_rank() { return emulation::thread_rank_in_block(); }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
};

class cluster_group {
 public:
  struct arrival_token {};

  static void sync(emulation::Place place = emulation::Place::current()) {
    emulation::cluster_arrive(place);
    emulation::cluster_wait(place);
  }
  static arrival_token barrier_arrive(emulation::Place place = emulation::Place::current()) {
    emulation::cluster_arrive(place);
    return {};
  }
  static void barrier_wait(emulation::Place place = emulation::Place::current()) {
    emulation::cluster_wait(place);
  }
  static void barrier_wait(arrival_token&&, emulation::Place place = emulation::Place::current()) {
    emulation::cluster_wait(place);
  }
  static unsigned block_rank() { return emulation::block_rank_in_cluster(); }
  static unsigned num_blocks() { return emulation::blocks_in_cluster(); }
  static unsigned thread_rank() {
    return block_rank() * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned num_threads() { return num_blocks() * thread_block::num_threads(); }

  // The same address in the shared memory of another block of the cluster.
  template <typename T>
  static T* map_shared_rank(T* address, unsigned rank) {
    return static_cast<T*>(emulation::map_shared_rank(address, rank));
  }
};

class grid_group {
 public:
  static void sync(emulation::Place place = emulation::Place::current()) {
    emulation::grid_barrier(place);
  }
  static bool is_valid() { return emulation::is_cooperative(); }
  static unsigned long long num_blocks() { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  static unsigned long long block_rank() {
    return blockIdx.x + 1ull * gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z);
  }
  static unsigned long long thread_rank() {
    return block_rank() * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned long long num_threads() { return num_blocks() * thread_block::num_threads(); }
};

inline thread_block this_thread_block() { return {}; }
inline cluster_group this_cluster() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
