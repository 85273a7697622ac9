// The shared memory of blocks: one allocation for each object, so that AddressSanitizer knows where
// each of them ends.
#include <algorithm>
#include <cstring>
#include <new>

#include "emulation.h"
#include "machine.h"

namespace emulation {
namespace {

// What ptxas allows a kernel to declare.
constexpr std::size_t kStaticLimit = 48 << 10;
constexpr char kDynamicKey = 0;
constexpr std::size_t kDynamicAlignment = 16;

}  // namespace

SharedObject& Machine::shared_object(Block& block, const void* key, std::size_t bytes,
                                     std::size_t alignment) {
  const Unseen unseen;
  SharedObject& object = block.shared[key];
  if (object.bytes != nullptr) return object;
  void* memory = nullptr;
  alignment = std::max(alignment, sizeof(void*));
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  object.bytes.reset(static_cast<char*>(memory));
  object.size = bytes;
  std::memset(memory, 0xff, bytes);
  if (block.retired) retire(object);
  return object;
}

// Another block of the cluster may still hold an address in here. It reads NaN, and
// AddressSanitizer reports it.
void Machine::retire(SharedObject& object) {
  std::memset(object.bytes.get(), 0xff, object.size);
  if (__asan_poison_memory_region != nullptr) {
    __asan_poison_memory_region(object.bytes.get(), object.size);
  }
}

void* Machine::static_shared(const void* key, std::size_t bytes, std::size_t alignment) {
  Block& block = *current_->block;
  if (!block.shared.contains(key)) {
    std::size_t used = bytes;
    for (const auto& [other, object] : block.shared) {
      if (other != &kDynamicKey) used += object.size;
    }
    static_shared_used_ = std::max(static_shared_used_, used);
    if (used > kStaticLimit) throw Failure("more than 48 KiB of static shared memory");
    if (used > launch_.static_shared_limit) {
      throw Failure("static and dynamic shared memory together exceed what a block may have");
    }
  }
  return shared_object(block, key, bytes, alignment).bytes.get();
}

void* Machine::dynamic_shared() {
  return shared_object(*current_->block, &kDynamicKey, launch_.dynamic_shared, kDynamicAlignment)
      .bytes.get();
}

void* Machine::map_shared_rank(const void* address, unsigned rank) {
  Block& own = *current_->block;
  if (rank >= own.cluster->blocks.size()) {
    throw Failure("map_shared_rank: the cluster has no block " + std::to_string(rank));
  }
  for (const auto& [key, object] : own.shared) {
    const auto offset = static_cast<const char*>(address) - object.bytes.get();
    if (offset < 0 || static_cast<std::size_t>(offset) >= object.size) continue;
    Block& other = *own.cluster->blocks[rank];
    // Blocks of a cluster run the same kernel: the object is there, or will be.
    return shared_object(other, key, object.size, kDynamicAlignment).bytes.get() + offset;
  }
  throw Failure("map_shared_rank: the address is not in the block's shared memory");
}

}  // namespace emulation
