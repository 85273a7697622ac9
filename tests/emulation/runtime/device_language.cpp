#include "device_language.h"

#include "machine.h"

namespace emulation {

void block_barrier(Place place) { Machine::instance().block_barrier(place); }
void grid_barrier(Place place) { Machine::instance().grid_barrier(place); }
void cluster_arrive(Place place, bool is_relaxed) {
  Machine::instance().cluster_arrive(place, is_relaxed);
}
void cluster_wait(Place place) { Machine::instance().cluster_wait(place); }
bool is_cooperative() { return Machine::instance().is_cooperative(); }

unsigned block_rank_in_cluster() { return Machine::instance().block().rank_in_cluster; }
unsigned blocks_in_cluster() {
  return static_cast<unsigned>(Machine::instance().block().cluster->blocks.size());
}

void warp_barrier(unsigned mask, Place place) { Machine::instance().meet(mask, place, {}); }

void shuffle(unsigned mask, int source, const void* value, void* result, std::size_t bytes,
             Place place) {
  Machine::instance().meet(mask, place, {Exchange::Kind::kShuffle, value, result, bytes, source});
}

unsigned ballot(unsigned mask, bool predicate, Place place) {
  unsigned votes = 0;
  Machine::instance().meet(mask, place,
                           {Exchange::Kind::kBallot, &predicate, &votes, sizeof(votes), 0});
  return votes;
}

// ThreadSanitizer orders a fence after all fences before it. That is more than CUDA promises where
// no atomic connects the two: a race behind such a pair is not reported.
void fence() {
  static Order order;
  order.acquire();
  order.release();
}

void yield() { Machine::instance().yield(); }

void* static_shared(const void* key, std::size_t bytes, std::size_t alignment) {
  return Machine::instance().static_shared(key, bytes, alignment);
}
void* dynamic_shared_memory() { return Machine::instance().dynamic_shared(); }
void* map_shared_rank(const void* address, unsigned rank) {
  return Machine::instance().map_shared_rank(address, rank);
}

}  // namespace emulation
