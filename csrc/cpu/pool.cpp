#include "cpu/pool.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm {
namespace cpu {
namespace {

// Allocations after which the greatest use of the period before is forgotten: a step of a network
// with a hundred layers makes some hundreds.
constexpr std::int64_t kPeriod = 1024;
constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kWorthHugePages = 2 * kHugePage;
constexpr std::size_t kPage = 4096;

// Sizes that share their blocks: eight for each doubling, so that at most an eighth is lost.
std::size_t capacity_of(std::size_t bytes) {
  std::size_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* new_block(std::size_t capacity) {
  const std::size_t alignment = capacity >= kWorthHugePages ? kHugePage : kPage;
  void* const memory =
      std::aligned_alloc(alignment, (capacity + alignment - 1) / alignment * alignment);
  if (memory) ask_for_huge_pages(memory, capacity);
  return memory;
}

}  // namespace

void ask_for_huge_pages(void* memory, std::size_t bytes) {
#if defined(__linux__)
  if (bytes < kWorthHugePages) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

bool Pool::take_kept(std::size_t capacity, Block* block) {
  // The last that was freed is the likeliest to be in a cache.
  const auto found = std::find_if(kept_.rbegin(), kept_.rend(),
                                  [&](const Block& kept) { return kept.capacity == capacity; });
  if (found == kept_.rend()) return false;
  *block = *found;
  kept_.erase(std::next(found).base());
  statistics_.kept -= static_cast<std::int64_t>(capacity);
  return true;
}

void Pool::count_use(std::int64_t change) {
  statistics_.in_use += change;
  peak_ = std::max(peak_, statistics_.in_use);
}

std::int64_t Pool::most_kept() const {
  return std::min(limit(), std::max(peak_, last_peak_) - statistics_.in_use);
}

std::vector<Pool::Block> Pool::surplus(std::int64_t most) {
  std::vector<Block> blocks;
  auto block = kept_.begin();
  for (; block != kept_.end() && statistics_.kept > most; ++block) {
    statistics_.kept -= static_cast<std::int64_t>(block->capacity);
    blocks.push_back(*block);
  }
  kept_.erase(kept_.begin(), block);
  return blocks;
}

void Pool::give_back(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) std::free(block.memory);
}

void* Pool::allocate(std::size_t bytes) {
  Block block{nullptr, capacity_of(bytes)};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (statistics_.allocations++ % kPeriod == 0) {
      last_peak_ = peak_;
      peak_ = statistics_.in_use;
    }
    if (take_kept(block.capacity, &block)) {
      ++statistics_.reused;
      in_use_.emplace(block.memory, block.capacity);
      count_use(static_cast<std::int64_t>(block.capacity));
      return block.memory;
    }
  }
  block.memory = new_block(block.capacity);
  if (!block.memory) {
    empty();
    block.memory = new_block(block.capacity);
    if (!block.memory) return nullptr;
  }
  std::vector<Block> blocks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_.emplace(block.memory, block.capacity);
    count_use(static_cast<std::int64_t>(block.capacity));
    blocks = surplus(most_kept());
  }
  give_back(blocks);
  return block.memory;
}

void Pool::release(void* memory) {
  std::vector<Block> blocks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = in_use_.find(memory);
    const Block block{memory, found->second};
    in_use_.erase(found);
    count_use(-static_cast<std::int64_t>(block.capacity));
    kept_.push_back(block);
    statistics_.kept += static_cast<std::int64_t>(block.capacity);
    blocks = surplus(most_kept());
  }
  give_back(blocks);
}

void Pool::set_limit(std::int64_t limit) {
  std::vector<Block> blocks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = limit;
    blocks = surplus(limit);
  }
  give_back(blocks);
}

void Pool::empty() {
  std::vector<Block> blocks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks = surplus(0);
  }
  give_back(blocks);
}

PoolStatistics Pool::statistics() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return statistics_;
}

void Pool::after_fork(bool is_child) {
  std::vector<Block> blocks;
  if (is_child) blocks = surplus(0);
  mutex_.unlock();
  give_back(blocks);
}

}  // namespace cpu
}  // namespace batchnorm
