// From the threads' sums to those of a channel: in a block, then among the blocks of a team. The
// order of every sum is fixed, so results are the same bit for bit from run to run.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/partials.cuh"

namespace batchnorm {
namespace cuda {

// A block's shared memory behind the slots (CudaScratch in core/plan_cuda.h). One pointer, since
// registers are scarce: the parts are found anew at each use.
template <typename A>
class Scratch {
 public:
  __device__ Scratch(const Geometry& g, Mapping mapping, void* shared)
      : g_(g), mapping_(mapping), shared_(static_cast<A*>(shared)) {}

  __device__ A* tree() const { return shared_; }
  __device__ A* partials() const { return shared_ + sizes().tree; }
  __device__ A* finals() const { return partials() + sizes().partials; }
  __device__ A* counts() const { return finals() + sizes().finals; }

 private:
  __device__ CudaScratch sizes() const {
    return cuda_scratch(g_.problem, mapping_, g_.unit_channels);
  }

  const Geometry& g_;
  Mapping mapping_;
  A* shared_;
};

// ---- among lanes of a warp ----------------------------------------------------------------------

constexpr int kWarps = kCudaThreads / 32;
__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x / 32); }
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

// Lane 0 of each `width` lanes gets all of theirs. Every lane of the warp must call it.
template <typename Rule, typename A>
__device__ void merge_lanes(Partial<A, 1>* partial, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    Partial<A, 1> other;
    other.first[0] = __shfl_down_sync(~0u, partial->first[0], distance, width);
    other.second[0] = __shfl_down_sync(~0u, partial->second[0], distance, width);
    other.count = __shfl_down_sync(~0u, partial->count, distance, width);
    Rule::merge(partial, other);
  }
}

// Lane 0's, to all.
template <typename A>
__device__ Partial<A, 1> of_first_lane(const Partial<A, 1>& partial) {
  Partial<A, 1> result;
  result.first[0] = __shfl_sync(~0u, partial.first[0], 0);
  result.second[0] = __shfl_sync(~0u, partial.second[0], 0);
  result.count = __shfl_sync(~0u, partial.count, 0);
  return result;
}

// ---- in a block ---------------------------------------------------------------------------------

template <typename A>
__device__ void write_partial(A* to, const Partial<A, 1>& partial) {
  to[0] = partial.first[0];
  to[1] = partial.second[0];
  to[2] = partial.count;
}
// volatile: never from a first-level cache, which other multiprocessors' stores do not reach.
template <typename A>
__device__ Partial<A, 1> read_partial(const volatile A* from) {
  Partial<A, 1> partial;
  partial.first[0] = from[0];
  partial.second[0] = from[1];
  partial.count = from[2];
  return partial;
}

// All threads' sums of one channel -> to[kPartialValues], by way of tree.
template <typename Rule, typename A>
__device__ void reduce_threads(Partial<A, 1> mine, A* tree, A* to) {
  merge_lanes<Rule>(&mine, 32);
  const int warp = warp_of_block();
  if (lane_of_warp() == 0) write_partial(tree + warp * kPartialValues, mine);
  __syncthreads();
  if (warp != 0) return;
  Partial<A, 1> of_warp;
  if (threadIdx.x < kWarps) of_warp = read_partial(tree + threadIdx.x * kPartialValues);
  merge_lanes<Rule>(&of_warp, 32);
  if (threadIdx.x == 0) write_partial(to, of_warp);
}
template <typename Rule, typename A, Access kAccess>
__device__ void reduce_block(const PlanesWalk<kAccess>&, const Partial<A, 1>& mine,
                             const Scratch<A>& scratch, A* to) {
  reduce_threads<Rule>(mine, scratch.tree(), to);
}

// The groups of rows -> group 0's threads, by halves. The tree is [2 lanes][threads].
template <typename Rule, typename A, Access kAccess>
__device__ void merge_groups(const ColumnsWalk<kAccess>& walk, Partial<A, kCellElements>* mine,
                             const Scratch<A>& scratch) {
  const int threads = walk.tree_threads();
  for (int live = walk.groups(); live > 1;) {
    const int half = (live + 1) / 2;
    const int at = (walk.group() - half) * walk.cells() + walk.cell();  // of those that give
    if (walk.group() >= half && walk.group() < live) {
#pragma unroll
      for (int l = 0; l < kCellElements; ++l) {
        scratch.tree()[2 * l * threads + at] = mine->first[l];
        scratch.tree()[(2 * l + 1) * threads + at] = mine->second[l];
      }
      scratch.counts()[at] = mine->count;
    }
    __syncthreads();
    if (walk.group() + half < live) {
      const int from = walk.group() * walk.cells() + walk.cell();
      Partial<A, kCellElements> other;
#pragma unroll
      for (int l = 0; l < kCellElements; ++l) {
        other.first[l] = scratch.tree()[2 * l * threads + from];
        other.second[l] = scratch.tree()[(2 * l + 1) * threads + from];
      }
      other.count = scratch.counts()[from];
      Rule::merge(mine, other);
    }
    __syncthreads();
    live = half;
  }
}

// All threads' sums -> to[channels][kPartialValues].
template <typename Rule, typename A, Access kAccess>
__device__ void reduce_block(const ColumnsWalk<kAccess>& walk, Partial<A, kCellElements> mine,
                             const Scratch<A>& scratch, A* to) {
  merge_groups<Rule>(walk, &mine, scratch);
  const int columns = walk.tree_threads() * kCellElements;  // the tree once more, as [2][columns]
  if (walk.group() == 0) {
#pragma unroll
    for (int l = 0; l < kCellElements; ++l) {
      const int column = walk.cell() * kCellElements + l;
      scratch.tree()[column] = mine.first[l];
      scratch.tree()[columns + column] = mine.second[l];
    }
    if (walk.cell() == 0) scratch.counts()[0] = mine.count;
  }
  __syncthreads();
  // A warp for each channel, or a thread where a channel is one column.
  const int each = walk.width() / walk.channels();
  const int width = each == 1 ? 1 : 32;
  const int lane = static_cast<int>(threadIdx.x) % width;
  for (int c = static_cast<int>(threadIdx.x) / width; c < walk.channels();
       c += kCudaThreads / width) {
    Partial<A, 1> of_channel;
    for (int j = lane; j < each; j += width) {
      Partial<A, 1> of_column;
      of_column.first[0] = scratch.tree()[c * each + j];
      of_column.second[0] = scratch.tree()[columns + c * each + j];
      of_column.count = scratch.counts()[0];
      Rule::merge(&of_channel, of_column);
    }
    merge_lanes<Rule>(&of_channel, width);
    if (lane == 0) write_partial(to + c * kPartialValues, of_channel);
  }
}

// ---- in a team ----------------------------------------------------------------------------------

// Where a block of a team puts its partial results, and finds the others'.
template <typename A>
class Exchange {
 public:
  // Places are found anew at each use, so that no pass has to keep them in registers.
  __device__ Exchange(const Geometry& g, const Scratch<A>& scratch, A* workspace, int wave)
      : g_(g), scratch_(scratch), workspace_(workspace), wave_(wave) {}

  __device__ A* mine(int rank) const {
    const bool in_memory = g_.strategy == Strategy::kGrid || g_.strategy == Strategy::kTwoKernels;
    return in_memory ? in_workspace(rank) : scratch_.partials();
  }

  __device__ Partial<A, 1> of(int rank, int channel) const {
    const A* const block = g_.strategy == Strategy::kCluster
                               ? in_block_of_cluster(scratch_.partials(), rank)
                               : mine(rank);
    return read_partial(block + channel * kPartialValues);
  }

  // Between the first pass and the second: every block of the team has its partial results out.
  template <typename Rule>
  __device__ void meet(const Unit& unit) const {
    if (g_.strategy == Strategy::kGrid) {
      grid_barrier();
      if (!g_.is_shared_out) return;
      sum_up<Rule>(unit);
      grid_barrier();
    } else if (g_.strategy == Strategy::kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // The unit's channel that this thread finishes, or -1.
  __device__ int own_channel(const Unit& unit) const {
    const int own = g_.is_gathered_by_warps ? warp_of_block() + lane_of_warp() * kWarps
                                            : static_cast<int>(threadIdx.x);
    return own < unit.channels ? own : -1;
  }

  // The total of that channel, if it has one. Called by all threads.
  template <typename Rule>
  __device__ Partial<A, 1> gather(const Unit& unit) const {
    if (g_.is_gathered_by_warps) return gather_by_warps<Rule>(unit);
    Partial<A, 1> total;
    const int c = own_channel(unit), parts = g_.is_shared_out ? 1 : g_.team;
    if (c < 0) return total;
    for (int rank = 0; rank < parts; ++rank) Rule::merge(&total, of(rank, c));
    return total;
  }

 private:
  __device__ A* in_workspace(int rank) const {
    const int waves = g_.strategy == Strategy::kGrid ? wave_ % 2 : wave_;
    const std::int64_t team = waves * g_.units_at_once + blockIdx.x / g_.team;
    return workspace_ + (team * g_.team + rank) * g_.unit_channels * kPartialValues;
  }

  template <typename Rule>
  __device__ Partial<A, 1> gather_by_warps(const Unit& unit) const {
    Partial<A, 1> own;
    int turn = 0;  // the lane whose channel it is
    for (int c = warp_of_block(); c < unit.channels; c += kWarps, ++turn) {
      Partial<A, 1> total;
      for (int rank = lane_of_warp(); rank < g_.team; rank += 32) Rule::merge(&total, of(rank, c));
      merge_lanes<Rule>(&total, 32);
      total = of_first_lane(total);
      if (lane_of_warp() == turn) own = total;
    }
    return own;
  }

  // The totals of the block's share of the channels. Nobody else reads these channels' partial
  // results, so the totals take the place of the first.
  template <typename Rule>
  __device__ void sum_up(const Unit& unit) const {
    for (int c = unit.rank; c < unit.channels; c += g_.team) {
      Partial<A, 1> mine;
      for (int rank = threadIdx.x; rank < g_.team; rank += kCudaThreads) {
        Rule::merge(&mine, of(rank, c));
      }
      reduce_threads<Rule>(mine, scratch_.tree(), in_workspace(0) + c * kPartialValues);
      __syncthreads();
    }
  }

  const Geometry& g_;
  const Scratch<A> scratch_;
  A* const workspace_;
  const int wave_;
};

// The second pass needs no other block's results any more; here ends the time in which they are
// read. Between the two a block may do what it likes, except to overwrite or lose its own. A
// cluster ends then (it has one wave), and nothing was written that others would wait for.
__device__ inline void have_gathered(Strategy strategy) {
  __syncthreads();
  if (strategy == Strategy::kCluster) cluster_arrive_relaxed();
}
__device__ inline void leave(Strategy strategy) {
  if (strategy == Strategy::kCluster) cluster_wait();
  __syncthreads();
}

}  // namespace cuda
}  // namespace batchnorm
