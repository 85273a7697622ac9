// Memory for large outputs, kept when it is freed. The C library gives such blocks back to the
// kernel, which clears every page before it gives it out again: as long as writing the output
// takes, and more.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace batchnorm {
namespace cpu {

struct PoolStatistics {
  std::int64_t in_use, kept;         // bytes
  std::int64_t allocations, reused;  // calls, and those of them that took a kept block
};

// Of memory that is about to be written: a fault for every 2 MiB instead of every 4 KiB. The kernel
// may ignore it (docs/decisions/0004).
void ask_for_huge_pages(void* memory, std::size_t bytes);

// Thread-safe; no memory is touched, nor given back, under the lock.
//
// What is kept is bounded twice: by a limit, and by this: together with what is in use it is never
// more than what was in use at once during the last one to two thousand allocations. A process that
// has forked has a pool of its own, with nothing kept.
class Pool {
 public:
  static constexpr std::int64_t kNoLimit = INT64_MAX;

  explicit Pool(std::int64_t limit) : limit_(limit) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { empty(); }

  // At least so many bytes, aligned to a cache line; null where there is no memory.
  void* allocate(std::size_t bytes);
  void release(void* block);

  // Of what is kept, bytes; 0 keeps nothing.
  void set_limit(std::int64_t limit);
  std::int64_t limit() const { return limit_.load(std::memory_order_relaxed); }
  void empty();
  PoolStatistics statistics() const;

  // To be called around a fork.
  void before_fork() { mutex_.lock(); }
  void after_fork(bool is_child);

 private:
  struct Block {
    void* memory;
    std::size_t capacity;
  };

  bool take_kept(std::size_t capacity, Block* block);
  void count_use(std::int64_t change);
  std::int64_t most_kept() const;
  // Takes out of kept_, the longest kept first, what is more than may be kept.
  std::vector<Block> surplus(std::int64_t most);
  static void give_back(const std::vector<Block>& blocks);

  mutable std::mutex mutex_;
  std::atomic<std::int64_t> limit_;
  std::unordered_map<void*, std::size_t> in_use_;  // capacities
  std::vector<Block> kept_;                        // in the order in which they were freed
  PoolStatistics statistics_{};
  std::int64_t peak_ = 0, last_peak_ = 0;  // in use at once: in this period, in the one before
};

}  // namespace cpu
}  // namespace batchnorm
