// Kernels with a mistake each, which some flavour of the emulation must report.
//
//   planted_mistakes NAME [SEEDS]     run one, under the seeds 1, 2, ... (20)
//   planted_mistakes list             the names
//
// Ends with 3 for a Failure, 4 for a wrong result, as the sanitizer likes for what a sanitizer
// found, and 0 if the mistake went unnoticed.
#include <cooperative_groups.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "selftest.h"

namespace {

namespace cg = cooperative_groups;
constexpr int kThreads = 64;

struct Row {
  float values[kThreads];
};

// ---- memory that is not ordered -----------------------------------------------------------------

__global__ void missing_block_barrier(float* y) {
  Row& row = block_shared<Row>();
  row.values[threadIdx.x] = 1.0f;
  y[threadIdx.x] = row.values[kThreads - 1 - threadIdx.x];
}

// The second turn overwrites what others still read of the first.
__global__ void missing_barrier_before_reuse(float* y) {
  Row& row = block_shared<Row>();
  bool right = true;
  for (int turn = 0; turn < 2; ++turn) {
    row.values[threadIdx.x] = static_cast<float>(turn);
    __syncthreads();
    right &= row.values[kThreads - 1 - threadIdx.x] == static_cast<float>(turn);
  }
  y[threadIdx.x] = right ? 1.0f : 0.0f;
}

// A shuffle orders no memory.
__global__ void missing_warp_barrier(float* y) {
  Row& row = block_shared<Row>();
  row.values[threadIdx.x] = 1.0f;
  const float one = __shfl_xor_sync(~0u, row.values[threadIdx.x], 1);
  y[threadIdx.x] = row.values[threadIdx.x ^ 1] * one;
}

__global__ void missing_grid_barrier(float* y, float* partial) {
  if (threadIdx.x == 0) partial[blockIdx.x] = 1.0f;
  if (blockIdx.x == 0) y[threadIdx.x] = partial[gridDim.x - 1];
}

__global__ void missing_cluster_barrier(float* y) {
  const cg::cluster_group cluster = cg::this_cluster();
  Row& row = block_shared<Row>();
  row.values[threadIdx.x] = 1.0f;
  __syncthreads();
  const Row* other = cluster.map_shared_rank(&row, cluster.block_rank() ^ 1);
  y[blockIdx.x * kThreads + threadIdx.x] = other->values[threadIdx.x];
  cluster.sync();
}

// What was written before a relaxed arrival need not be there behind the barrier.
__global__ void relaxed_cluster_barrier(float* y) {
  const cg::cluster_group cluster = cg::this_cluster();
  Row& row = block_shared<Row>();
  row.values[threadIdx.x] = 1.0f;
  __cluster_barrier_arrive_relaxed();
  cluster.barrier_wait();
  const Row* other = cluster.map_shared_rank(&row, cluster.block_rank() ^ 1);
  y[blockIdx.x * kThreads + threadIdx.x] = other->values[threadIdx.x];
  cluster.sync();
}

// The other block may have ended, and its shared memory with it.
__global__ void missing_cluster_barrier_at_the_end(float* y) {
  const cg::cluster_group cluster = cg::this_cluster();
  Row& row = block_shared<Row>();
  row.values[threadIdx.x] = 1.0f;
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  __syncthreads();
  y[threadIdx.x] = cluster.map_shared_rank(&row, 1)->values[threadIdx.x];
}

__global__ void two_blocks_one_output(float* y) {
  y[threadIdx.x] = static_cast<float>(blockIdx.x + 1 - blockIdx.x);
}

__global__ void missing_fence(float* y, float* partial, unsigned* arrived) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = 1.0f;
  if (atomicAdd(arrived, 1u) + 1 < gridDim.x) return;
  for (unsigned i = 0; i < gridDim.x; ++i) y[i] = partial[i];
}

// ---- addresses ----------------------------------------------------------------------------------

__global__ void past_the_end_of_global(float* y) { y[kThreads + threadIdx.x] = 1.0f; }

__global__ void past_the_end_of_dynamic_shared(float* y) {
  float* row = dynamic_shared<float>();
  row[threadIdx.x + 1] = 1.0f;
  y[threadIdx.x] = row[threadIdx.x + 1];
}

__global__ void past_the_end_of_static_shared(float* y) {
  y[threadIdx.x] = 1.0f;
  block_shared<Row>().values[threadIdx.x + 1] = 1.0f;
}

__global__ void misaligned_vector(float* y) {
  const float4 ones = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  if (threadIdx.x < kThreads / 4 - 1) __stcs(reinterpret_cast<float4*>(y + 1) + threadIdx.x, ones);
}

__global__ void uninitialised_shared(float* y) {
  y[threadIdx.x] = block_shared<Row>().values[threadIdx.x] == 0.0f ? 1.0f : 0.0f;
}

// ---- barriers -----------------------------------------------------------------------------------

__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(float* y) {
  if (threadIdx.x % 2 == 0) {
    y[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 2);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 2);
  }
}

__global__ void shuffle_of_half_a_warp(float* y) {
  y[threadIdx.x] = 1.0f;
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  __syncthreads();
}

__global__ void return_before_barrier(float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void lane_outside_its_mask(float* y) { y[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

__global__ void grid_barrier(float*) { cg::this_grid().sync(); }

__global__ void cluster_arrives_twice(float*) {
  cg::this_cluster().barrier_arrive();
  cg::this_cluster().barrier_arrive();
}

__global__ void cluster_waits_without_arriving(float*) { cg::this_cluster().barrier_wait(); }

__global__ void clusters_of_old_code(float*) { cg::this_cluster().sync(); }

__global__ void no_such_cluster_rank(float* y) {
  y[threadIdx.x] = cg::this_cluster().map_shared_rank(&block_shared<Row>(), 2)->values[0];
}

__global__ void poll_forever(unsigned* flag) {
  while (atomicAdd(flag, 0u) == 0) {
  }
}

// ---- resources ----------------------------------------------------------------------------------

template <int kBytes>
struct Bytes {
  char values[kBytes];
};

__global__ void too_much_static_shared(float*) {
  block_shared<Bytes<40 << 10>>().values[0] = 0;
  block_shared<Bytes<9 << 10>>().values[0] = 0;
}

__global__ void too_deep(int* depth) {
  volatile char frame[1024];
  for (volatile char& byte : frame) byte = 0;
  if (++*depth < 1000) too_deep(depth);
  frame[0] = 1;
}

// ---- which, and how -----------------------------------------------------------------------------

// Whether y is all ones, as each of the kernels above intends.
using Case = std::function<bool(std::vector<float>& y)>;

template <typename Kernel>
Case simple(Kernel* kernel, Shape shape) {
  if (shape.block.x == 32) shape.block.x = kThreads;
  return [=](std::vector<float>& y) {
    y.resize(std::size_t{shape.cluster.x > 0 ? shape.grid.x : 1} * kThreads);
    return launch(shape, kernel, y.data()) == cudaSuccess;
  };
}

void add_simple(std::map<std::string, Case>& all) {
  const Shape block = {}, blocks{.grid = 4}, cluster{.grid = 2, .cluster = 2};
#define ADD(kernel, shape) all[#kernel] = simple(kernel, shape)
  ADD(missing_block_barrier, block);
  ADD(missing_barrier_before_reuse, block);
  ADD(missing_warp_barrier, block);
  ADD(missing_cluster_barrier, cluster);
  ADD(relaxed_cluster_barrier, cluster);
  ADD(two_blocks_one_output, blocks);
  ADD(past_the_end_of_global, block);
  ADD(past_the_end_of_dynamic_shared, (Shape{.dynamic_shared = sizeof(Row)}));
  ADD(past_the_end_of_static_shared, block);
  ADD(misaligned_vector, block);
  ADD(uninitialised_shared, block);
  ADD(divergent_barrier, block);
  ADD(divergent_shuffle, block);
  ADD(shuffle_of_half_a_warp, block);
  ADD(return_before_barrier, block);
  ADD(lane_outside_its_mask, block);
  ADD(grid_barrier, blocks);
  ADD(cluster_arrives_twice, cluster);
  ADD(cluster_waits_without_arriving, cluster);
  ADD(no_such_cluster_rank, cluster);
  ADD(too_much_static_shared, block);
#undef ADD
}

// Those that need a launch or memory of their own.
void add_others(std::map<std::string, Case>& all) {
  const Shape block = {}, blocks{.grid = 4};
  all["missing_cluster_barrier_at_the_end"] = [=](std::vector<float>& y) {
    y.resize(kThreads);
    const Shape shape{.grid = 2, .block = kThreads, .cluster = 2};
    return launch(shape, missing_cluster_barrier_at_the_end, y.data()) == cudaSuccess;
  };
  all["clusters_of_old_code"] = [=](std::vector<float>&) {
    emulation::set_device({.code_architecture = 80});
    return launch(Shape{.grid = 2, .cluster = 2}, clusters_of_old_code, nullptr) == cudaSuccess;
  };
  all["missing_grid_barrier"] = [=](std::vector<float>& y) {
    y.resize(kThreads);
    std::vector<float> partial(blocks.grid.x);
    const Shape shape{.grid = 4, .block = kThreads, .cooperative = true};
    return launch(shape, missing_grid_barrier, y.data(), partial.data()) == cudaSuccess;
  };
  all["missing_fence"] = [=](std::vector<float>& y) {
    y.resize(blocks.grid.x);
    std::vector<float> partial(blocks.grid.x);
    unsigned arrived = 0;
    return launch(blocks, missing_fence, y.data(), partial.data(), &arrived) == cudaSuccess;
  };
  all["too_many_threads"] = [=](std::vector<float>&) {
    emulation::set_device({.multiprocessors = 1000});
    const Shape shape{.grid = 17, .block = 1024, .cooperative = true};
    return launch(shape, grid_barrier, nullptr) == cudaSuccess;
  };
  all["poll_forever"] = [=](std::vector<float>&) {
    unsigned flag = 0;
    return launch(block, poll_forever, &flag) == cudaSuccess;
  };
  all["too_deep"] = [=](std::vector<float>&) {
    int depth = 0;
    return launch(Shape{.block = 1}, too_deep, &depth) == cudaSuccess;
  };
}

// Ends the program at the first seed under which the mistake shows.
int run(const Case& planted, int seeds) {
  for (int seed = 1; seed <= seeds; ++seed) {
    emulation::set_seed(static_cast<std::uint64_t>(seed));
    std::vector<float> y;
    try {
      if (!planted(y)) return std::puts("REFUSED"), 5;
    } catch (const emulation::Failure& failure) {
      std::printf("FAILURE %s\n", failure.what());
      return 3;
    }
    for (const float value : y) {
      if (value == 1.0f) continue;
      std::printf("WRONG %g under seed %d\n", static_cast<double>(value), seed);
      return 4;
    }
  }
  std::puts("unnoticed");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  std::map<std::string, Case> all;
  add_simple(all);
  add_others(all);
  const std::string name = count > 1 ? arguments[1] : "list";
  if (const auto found = all.find(name); found != all.end()) {
    return run(found->second, count > 2 ? std::atoi(arguments[2]) : 20);
  }
  for (const auto& [known, planted] : all) std::puts(known.c_str());
  return name == "list" ? 0 : 2;
}
