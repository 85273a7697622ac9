// The emulated device at work: the threads of the running launch, what they wait for, who is next.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device_language.h"
#include "fiber.h"
#include "sanitizers.h"

namespace emulation {

struct Block;
struct Cluster;

// What a shuffle or vote gives to and wants from the lanes that meet.
struct Exchange {
  enum class Kind { kNone, kShuffle, kBallot };
  Kind kind = Kind::kNone;
  const void* value = nullptr;
  void* result = nullptr;
  std::size_t bytes = 0;
  int source = 0;
};

// Where a thread waits, for the error messages.
struct Wait {
  const char* what = "";  // "block barrier"
  Place place;
  unsigned mask = 0;  // of lanes, if those of a warp meet

  std::string describe() const;
};

struct Thread {
  enum class State { kReady, kWaiting, kDone };

  unsigned rank = 0;  // in the block
  Block* block = nullptr;
  State state = State::kReady;
  std::unique_ptr<Fiber> fiber;
  Wait wait;
  Exchange exchange;
  bool has_arrived_at_cluster = false;
  unsigned cluster_phase = 0;  // in which it has
};

// A barrier that all threads of a block, cluster or grid must reach, time after time.
struct Barrier {
  const char* what = "";
  unsigned size = 0;
  unsigned arrived = 0;
  unsigned phase = 0;
  Place place;  // where the first thread of this phase arrived
  std::vector<Thread*> waiting;
  // Of even and odd phases. A thread may arrive at the next phase before another has woken up from
  // the last, and must not order that one's memory.
  Order order[2];
};

// Lanes of a warp that wait for each other at one barrier, shuffle or vote.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  Place place;
  Order* order;
};

struct Warp {
  unsigned live = 0;  // the lanes that exist and haven't returned
  std::vector<Meeting> open;
  // By the lowest lane of the mask and, as for barriers, the parity of their meetings.
  Order orders[32][2];
  unsigned odd = 0;
};

struct SharedObject {
  std::unique_ptr<char, void (*)(void*)> bytes{nullptr, &std::free};
  std::size_t size = 0;
};

struct Block {
  uint3 index = {};
  Cluster* cluster = nullptr;
  unsigned rank_in_cluster = 0;
  unsigned live = 0;
  bool retired = false;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::map<const void*, SharedObject> shared;
};

struct Cluster {
  unsigned live_blocks = 0;
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

// What the launch was checked and asked for.
struct Launch {
  dim3 cluster = dim3(1, 1, 1);
  bool cooperative = false;
  std::size_t dynamic_shared = 0;
  std::size_t static_shared_limit = 0;
  std::size_t resident_blocks = 0;  // at a time, over the whole device
  int code_architecture = 0;        // 90 for 9.0
  const std::function<void()>* body = nullptr;
};

class Machine {
 public:
  static Machine& instance();

  void seed(std::uint64_t seed) { random_.seed(seed); }

  // Runs a grid to its end. Returns how much static shared memory its blocks used. Throws Failure.
  std::size_t run(const Launch& launch);

  // ---- called by the running thread

  void block_barrier(Place place);
  void grid_barrier(Place place);
  // Relaxed: what the thread wrote before is not yet there for others.
  void cluster_arrive(Place place, bool is_relaxed);
  void cluster_wait(Place place);
  void meet(unsigned mask, Place place, const Exchange& exchange);
  void yield();
  void* static_shared(const void* key, std::size_t bytes, std::size_t alignment);
  void* dynamic_shared();
  void* map_shared_rank(const void* address, unsigned rank);

  const Block& block() const { return *current_->block; }
  bool is_cooperative() const { return launch_.cooperative; }
  std::uint64_t threads_run() const { return threads_run_; }
  std::uint64_t switches() const { return switches_; }

 private:
  // machine.cpp: the life of clusters, blocks and threads
  void choose_whom_to_hold_back();
  void make_ready(Thread& thread);
  std::vector<uint3> shuffled_clusters();
  void run_clusters();
  void add_cluster(uint3 first);
  void add_threads(Block& block);
  void start(Thread& thread);
  static void thread_main();
  void step();
  void finish(Thread& thread);
  void finish(Block& block);
  void cancel();
  void pause();
  std::string describe_deadlock() const;

  // rendezvous.cpp
  void arrive_at(Barrier& barrier, Place place, bool is_relaxed = false);
  void wait_for(Barrier& barrier, unsigned phase);
  void wake(Thread& thread);
  Meeting& join(Warp& warp, unsigned mask, unsigned lane, Place place);
  void close_if_complete(Block& block, unsigned warp_rank, std::size_t meeting);
  void leave_warp(Thread& thread);

  // shared_memory.cpp
  SharedObject& shared_object(Block& block, const void* key, std::size_t bytes,
                              std::size_t alignment);
  static void retire(SharedObject& object);

  static constexpr unsigned kNone = ~0u;

  std::mt19937_64 random_;
  Launch launch_;
  Barrier grid_;
  std::vector<std::unique_ptr<Cluster>> clusters_;  // those that have started and not finished
  std::size_t live_blocks_ = 0;
  std::vector<Thread*> ready_, slow_ready_;
  unsigned slow_block_ = 0, slow_warp_ = 0;  // who is held back
  std::vector<std::unique_ptr<Fiber>> free_fibers_;
  std::minstd_rand fiber_choice_;  // of its own: the seed alone decides on the order of threads
  Thread* current_ = nullptr;
  std::exception_ptr failure_;  // of the running thread
  bool cancelled_ = false;
  std::size_t static_shared_used_ = 0;
  std::uint64_t yields_in_a_row_ = 0;
  std::uint64_t threads_run_ = 0;
  std::uint64_t switches_ = 0;
  Order started_, ended_;  // the launch
};

}  // namespace emulation
