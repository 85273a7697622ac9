#include "machine.h"

#include <algorithm>
#include <sstream>

#include "emulation.h"

namespace emulation {
namespace {

// Blocks that may run at the same time in a launch that is not cooperative are limited to about
// this many threads: more would find no more mistakes, only fall out of the cache.
constexpr unsigned kConcurrentThreads = 512;

// Threads that are held back get one turn in so many: a thread that polls has to see them move.
constexpr std::uint64_t kTurnsOfOthers = 256;

// So many atomics in a row without a thread that returns or meets another: nobody will.
constexpr std::uint64_t kLivelockYields = 1 << 23;

// Unwinds the stacks of threads that will never return.
struct Cancelled {};

unsigned volume(dim3 dimensions) { return dimensions.x * dimensions.y * dimensions.z; }

std::string to_string(uint3 index) {
  std::ostringstream out;
  out << '(' << index.x << ", " << index.y << ", " << index.z << ')';
  return out.str();
}

uint3 thread_index(unsigned rank) {
  return {rank % blockDim.x, rank / blockDim.x % blockDim.y, rank / (blockDim.x * blockDim.y)};
}

}  // namespace

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

std::size_t Machine::run(const Launch& launch) {
  const Unseen unseen;
  launch_ = launch;
  static_shared_used_ = 0;
  yields_in_a_row_ = 0;
  grid_.what = "grid barrier";
  grid_.size = volume(gridDim) * volume(blockDim);
  grid_.arrived = 0;
  grid_.waiting.clear();
  choose_whom_to_hold_back();
  Fiber::attach_scheduler();
  started_.release();
  std::exception_ptr failure;
  try {
    run_clusters();
  } catch (const Failure&) {
    failure = std::current_exception();
  }
  if (failure) cancel();
  ended_.acquire();
  if (failure) std::rethrow_exception(failure);
  return static_shared_used_;
}

// In two of three launches a block, or a warp of all blocks, falls behind as far as it can:
// mistakes that need one to be much faster than another are not left to chance.
void Machine::choose_whom_to_hold_back() {
  slow_block_ = slow_warp_ = kNone;
  switch (random_() % 3) {
    case 0:
      slow_block_ = static_cast<unsigned>(random_() % gridDim.x);
      break;
    case 1:
      slow_warp_ =
          static_cast<unsigned>(random_() % ((volume(blockDim) + warpSize - 1) / warpSize));
      break;
    default:
      break;
  }
}

void Machine::make_ready(Thread& thread) {
  const bool is_slow = thread.block->index.x == slow_block_ || thread.rank / warpSize == slow_warp_;
  (is_slow ? slow_ready_ : ready_).push_back(&thread);
}

std::vector<uint3> Machine::shuffled_clusters() {
  std::vector<uint3> firsts;
  const dim3 step = launch_.cluster;
  for (unsigned z = 0; z < gridDim.z; z += step.z) {
    for (unsigned y = 0; y < gridDim.y; y += step.y) {
      for (unsigned x = 0; x < gridDim.x; x += step.x) firsts.push_back({x, y, z});
    }
  }
  std::shuffle(firsts.begin(), firsts.end(), random_);
  return firsts;
}

// A cooperative launch runs all blocks at once; another one, now and then one by one: CUDA promises
// no more.
void Machine::run_clusters() {
  std::vector<uint3> to_come = shuffled_clusters();
  std::size_t at_a_time = launch_.resident_blocks;
  if (!launch_.cooperative) {
    const std::size_t limit = std::max(1u, kConcurrentThreads / volume(blockDim));
    at_a_time = 1 + random_() % std::min(limit, launch_.resident_blocks);
  }
  const std::size_t cluster_size = volume(launch_.cluster);
  while (!to_come.empty() || !clusters_.empty()) {
    while (!to_come.empty() && (clusters_.empty() || live_blocks_ + cluster_size <= at_a_time)) {
      add_cluster(to_come.back());
      to_come.pop_back();
    }
    if (ready_.empty() && slow_ready_.empty()) throw Failure(describe_deadlock());
    step();
  }
}

void Machine::add_cluster(uint3 first) {
  const dim3 dim = launch_.cluster;
  Cluster& cluster = *clusters_.emplace_back(std::make_unique<Cluster>());
  cluster.live_blocks = volume(dim);
  cluster.barrier.what = "cluster barrier";
  cluster.barrier.size = volume(dim) * volume(blockDim);
  for (unsigned rank = 0; rank < volume(dim); ++rank) {
    Block& block = *cluster.blocks.emplace_back(std::make_unique<Block>());
    block.index = {first.x + rank % dim.x, first.y + rank / dim.x % dim.y,
                   first.z + rank / (dim.x * dim.y)};
    block.cluster = &cluster;
    block.rank_in_cluster = rank;
    add_threads(block);
    ++live_blocks_;
  }
}

void Machine::add_threads(Block& block) {
  const unsigned count = volume(blockDim);
  block.live = count;
  block.barrier.what = "block barrier";
  block.barrier.size = count;
  block.warps = std::vector<Warp>((count + warpSize - 1) / warpSize);
  block.threads = std::vector<Thread>(count);
  for (unsigned rank = 0; rank < count; ++rank) {
    Thread& thread = block.threads[rank];
    thread.rank = rank;
    thread.block = &block;
    block.warps[rank / warpSize].live |= 1u << rank % warpSize;
    start(thread);
  }
}

// Any free fiber, not the last one: to ThreadSanitizer, what runs on one fiber is one thread, and
// two blocks that always shared theirs could never race.
void Machine::start(Thread& thread) {
  if (free_fibers_.empty()) {
    free_fibers_.push_back(std::make_unique<Fiber>());
  } else {
    std::swap(free_fibers_[fiber_choice_() % free_fibers_.size()], free_fibers_.back());
  }
  thread.fiber = std::move(free_fibers_.back());
  free_fibers_.pop_back();
  thread.fiber->start(&Machine::thread_main);
  make_ready(thread);
  ++threads_run_;
}

void Machine::thread_main() {
  Machine& machine = instance();
  machine.started_.acquire();
  try {
    if (!machine.cancelled_) (*machine.launch_.body)();
  } catch (const Cancelled&) {
  } catch (const Failure& failure) {
    const Thread& thread = *machine.current_;
    machine.failure_ = std::make_exception_ptr(Failure(
        std::string(failure.what()) + "\n  in thread " + to_string(thread_index(thread.rank)) +
        " of block " + to_string(thread.block->index)));
  } catch (...) {
    machine.failure_ = std::make_exception_ptr(Failure("a kernel threw an exception"));
  }
  machine.ended_.release();
  machine.current_->state = Thread::State::kDone;
}

// Lets one thread run, any of those that can, until it waits, returns or yields.
void Machine::step() {
  const bool is_others_turn = !slow_ready_.empty() && random_() % kTurnsOfOthers == 0;
  std::vector<Thread*>& ready = ready_.empty() || is_others_turn ? slow_ready_ : ready_;
  std::swap(ready[random_() % ready.size()], ready.back());
  Thread& thread = *ready.back();
  ready.pop_back();
  current_ = &thread;
  blockIdx = thread.block->index;
  threadIdx = thread_index(thread.rank);
  ++switches_;
  thread.fiber->enter();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  if (thread.state == Thread::State::kDone) finish(thread);
}

void Machine::finish(Thread& thread) {
  yields_in_a_row_ = 0;
  free_fibers_.push_back(std::move(thread.fiber));
  leave_warp(thread);
  if (--thread.block->live == 0) finish(*thread.block);
}

void Machine::finish(Block& block) {
  --live_blocks_;
  block.retired = true;
  for (auto& [key, object] : block.shared) retire(object);
  if (--block.cluster->live_blocks > 0) return;
  const auto found = std::find_if(clusters_.begin(), clusters_.end(), [&](const auto& cluster) {
    return cluster.get() == block.cluster;
  });
  clusters_.erase(found);
}

// Ends the threads that haven't returned, after a failure of one of them.
void Machine::cancel() {
  cancelled_ = true;
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) {
      for (Thread& thread : block->threads) {
        current_ = &thread;
        if (thread.fiber == nullptr) continue;
        if (thread.state != Thread::State::kDone) thread.fiber->enter();
        free_fibers_.push_back(std::move(thread.fiber));
      }
    }
  }
  cancelled_ = false;
  failure_ = nullptr;
  ready_.clear();
  slow_ready_.clear();
  clusters_.clear();
  live_blocks_ = 0;
}

void Machine::pause() {
  current_->fiber->leave();
  if (cancelled_) throw Cancelled();
}

void Machine::yield() {
  if (++yields_in_a_row_ > kLivelockYields) {
    throw Failure("a livelock: threads poll memory and none of them gets any further");
  }
  wake(*current_);
  pause();
}

std::string Machine::describe_deadlock() const {
  std::ostringstream out;
  out << "a deadlock: no thread can run";
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) {
      std::map<std::string, int> counts;
      for (const Thread& thread : block->threads) {
        const bool done = thread.state == Thread::State::kDone;
        ++counts[done ? "returned" : "at " + thread.wait.describe()];
      }
      out << "\n  block " << to_string(block->index) << ':';
      for (const auto& [where, count] : counts) out << "\n    " << count << ' ' << where;
    }
  }
  return out.str();
}

}  // namespace emulation
