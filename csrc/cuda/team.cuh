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
  constexpr int kWarps = kCudaThreads / 32;
  merge_lanes<Rule>(&mine, 32);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) write_partial(tree + warp * kPartialValues, mine);
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
  __device__ Exchange(const Geometry& g, const Scratch<A>& scratch, A* workspace, int wave)
      : g_(g), shared_(scratch.partials()) {
    const int waves = g.strategy == Strategy::kGrid ? wave % 2 : wave;
    const std::int64_t of_block = g.unit_channels * kPartialValues;
    const std::int64_t slot = waves * g.units_at_once + blockIdx.x / g.team;
    in_memory_ = g.strategy == Strategy::kGrid || g.strategy == Strategy::kTwoKernels;
    of_block_ = of_block;
    team_ = in_memory_ ? workspace + slot * g.team * of_block : nullptr;
  }

  __device__ A* mine(int rank) const { return in_memory_ ? team_ + rank * of_block_ : shared_; }

  __device__ Partial<A, 1> of(int rank, int channel) const {
    const A* block = in_memory_ ? team_ + rank * of_block_ : shared_;
    if (g_.strategy == Strategy::kCluster) block = in_block_of_cluster(shared_, rank);
    return read_partial(block + channel * kPartialValues);
  }

  // Between the first pass and the second: every block of the team has its partial results out.
  template <typename Rule>
  __device__ void meet(const Unit& unit, bool active, const Scratch<A>& scratch) const {
    if (g_.strategy == Strategy::kGrid) {
      grid_barrier();
      if (!is_shared_out()) return;
      if (active) sum_up<Rule>(unit, scratch);
      grid_barrier();
    } else if (g_.strategy == Strategy::kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // Calls finish(channel, total) in one thread for each of the unit's channels.
  template <typename Rule, typename Finish>
  __device__ void gather(const Unit& unit, const Finish& finish) const {
    // Where totals are not there yet, a warp reads what a thread alone would wait for.
    const int team = is_shared_out() ? 1 : g_.team;
    const int width = team > 8 ? 32 : 1;
    const int lane = static_cast<int>(threadIdx.x) % width;
    for (int c = static_cast<int>(threadIdx.x) / width; c < unit.channels;
         c += kCudaThreads / width) {
      Partial<A, 1> total;
      for (int rank = lane; rank < team; rank += width) Rule::merge(&total, of(rank, c));
      merge_lanes<Rule>(&total, width);
      if (lane == 0) finish(c, total);
    }
  }

 private:
  __device__ bool is_shared_out() const {
    return shares_out(g_.strategy, g_.team, g_.unit_channels);
  }

  // The totals of the block's share of the channels. Nobody else reads these channels' partial
  // results, so the totals take the place of the first.
  template <typename Rule>
  __device__ void sum_up(const Unit& unit, const Scratch<A>& scratch) const {
    for (int c = unit.rank; c < unit.channels; c += g_.team) {
      Partial<A, 1> mine;
      for (int rank = threadIdx.x; rank < g_.team; rank += kCudaThreads) {
        Rule::merge(&mine, of(rank, c));
      }
      reduce_threads<Rule>(mine, scratch.tree(), team_ + c * kPartialValues);
      __syncthreads();
    }
  }

  const Geometry& g_;
  A *shared_, *team_;
  std::int64_t of_block_;
  bool in_memory_;
};

// The second pass needs no other block's results any more; here ends the time in which they are
// read. Between the two a block may do what it likes, except to overwrite or lose its own.
__device__ inline void have_gathered(Strategy strategy) {
  __syncthreads();
  if (strategy == Strategy::kCluster) cluster_arrive();
}
__device__ inline void leave(Strategy strategy) {
  if (strategy == Strategy::kCluster) cluster_wait();
  __syncthreads();
}

}  // namespace cuda
}  // namespace batchnorm
