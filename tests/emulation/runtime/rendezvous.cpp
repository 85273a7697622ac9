// Where threads meet: barriers of a block, cluster or grid, and the collectives of a warp.
#include <bit>
#include <cstring>
#include <sstream>

#include "emulation.h"
#include "machine.h"

namespace emulation {
namespace {

bool same_place(const Place& a, const Place& b) {
  if (a.line() != b.line() || a.column() != b.column()) return false;
  return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
}

[[noreturn]] void fail_divergent(const Wait& one, const Wait& other) {
  throw Failure("a divergent barrier: " + one.describe() + ", while others are at " +
                other.describe());
}

// A compiler makes no memcpy of this, which ThreadSanitizer would watch.
void copy(const void* from, void* to, std::size_t bytes) {
  const auto* source = static_cast<const volatile char*>(from);
  auto* target = static_cast<volatile char*>(to);
  if (bytes == sizeof(int)) {  // most often
    *static_cast<volatile int*>(to) = *static_cast<const volatile int*>(from);
    return;
  }
  for (std::size_t i = 0; i < bytes; ++i) target[i] = source[i];
}

void fill(void* to, std::size_t bytes) {
  auto* target = static_cast<volatile char*>(to);
  for (std::size_t i = 0; i < bytes; ++i) target[i] = static_cast<char>(0xff);
}

// Gives each lane that has met the value of its source lane.
void shuffle_among(Thread* lanes, unsigned met) {
  for (unsigned rest = met; rest != 0; rest &= rest - 1) {
    const Exchange& to = lanes[std::countr_zero(rest)].exchange;
    const bool has_source = to.source >= 0 && to.source < warpSize && (met >> to.source & 1) != 0;
    if (has_source) {
      copy(lanes[to.source].exchange.value, to.result, to.bytes);
    } else {
      fill(to.result, to.bytes);
    }
  }
}

void vote_among(Thread* lanes, unsigned met) {
  unsigned votes = 0;
  for (unsigned rest = met; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (*static_cast<const volatile bool*>(lanes[lane].exchange.value)) votes |= 1u << lane;
  }
  for (unsigned rest = met; rest != 0; rest &= rest - 1) {
    *static_cast<volatile unsigned*>(lanes[std::countr_zero(rest)].exchange.result) = votes;
  }
}

const char* name_of(Exchange::Kind kind) {
  switch (kind) {
    case Exchange::Kind::kShuffle:
      return "shuffle";
    case Exchange::Kind::kBallot:
      return "vote";
    default:
      return "warp barrier";
  }
}

}  // namespace

std::string Wait::describe() const {
  std::ostringstream out;
  out << "the " << what << " at " << place.file_name() << ':' << place.line();
  if (mask != 0) out << " (mask 0x" << std::hex << mask << ')';
  return out.str();
}

void Machine::wake(Thread& thread) {
  const Unseen unseen;
  thread.state = Thread::State::kReady;
  make_ready(thread);
}

void Machine::arrive_at(Barrier& barrier, Place place, bool is_relaxed) {
  const Unseen unseen;
  yields_in_a_row_ = 0;
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (!same_place(barrier.place, place)) {
    fail_divergent({barrier.what, place}, {barrier.what, barrier.place});
  }
  if (!is_relaxed) barrier.order[barrier.phase % 2].release();
  if (++barrier.arrived < barrier.size) return;
  barrier.arrived = 0;
  ++barrier.phase;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

// Returns when the phase, the one that the caller arrived in, is over.
void Machine::wait_for(Barrier& barrier, unsigned phase) {
  if (barrier.phase != phase) {
    wake(*current_);  // it can go on, but others may as well go first
  } else {
    const Unseen unseen;
    current_->wait = {barrier.what, barrier.place};
    current_->state = Thread::State::kWaiting;
    barrier.waiting.push_back(current_);
  }
  pause();
  barrier.order[phase % 2].acquire();
}

void Machine::block_barrier(Place place) {
  Barrier& barrier = current_->block->barrier;
  const unsigned phase = barrier.phase;
  arrive_at(barrier, place);
  wait_for(barrier, phase);
}

void Machine::grid_barrier(Place place) {
  if (!launch_.cooperative) {
    throw Failure(Wait{grid_.what, place}.describe() + ": the launch is not cooperative");
  }
  const unsigned phase = grid_.phase;
  arrive_at(grid_, place);
  wait_for(grid_, phase);
}

void Machine::cluster_arrive(Place place, bool is_relaxed) {
  Barrier& barrier = current_->block->cluster->barrier;
  if (launch_.code_architecture < 90) {
    throw Failure(Wait{barrier.what, place}.describe() + ": the code is for less than 9.0");
  }
  if (std::exchange(current_->has_arrived_at_cluster, true)) {
    throw Failure(Wait{barrier.what, place}.describe() +
                  ": a thread arrives again without having waited");
  }
  current_->cluster_phase = barrier.phase;
  arrive_at(barrier, place, is_relaxed);
}

void Machine::cluster_wait(Place place) {
  Barrier& barrier = current_->block->cluster->barrier;
  if (!std::exchange(current_->has_arrived_at_cluster, false)) {
    throw Failure(Wait{barrier.what, place}.describe() + ": a thread waits without having arrived");
  }
  wait_for(barrier, current_->cluster_phase);
}

// The lanes of a mask meet at one place. A thread that would wait for one that waits for it, at
// another place or with another mask, waits forever.
Meeting& Machine::join(Warp& warp, unsigned mask, unsigned lane, Place place) {
  for (Meeting& meeting : warp.open) {
    if (meeting.mask == mask && same_place(meeting.place, place)) {
      meeting.arrived |= 1u << lane;
      return meeting;
    }
    if ((meeting.mask >> lane & 1) != 0 && (meeting.arrived & mask) != 0) {
      fail_divergent({"warp collective", place, mask},
                     {"warp collective", meeting.place, meeting.mask});
    }
  }
  const int first = std::countr_zero(mask);
  Order* order = &warp.orders[first][warp.odd >> first & 1];
  return warp.open.emplace_back(Meeting{mask, 1u << lane, place, order});
}

void Machine::meet(unsigned mask, Place place, const Exchange& exchange) {
  Thread& thread = *current_;
  const unsigned warp_rank = thread.rank / warpSize, lane = thread.rank % warpSize;
  const char* what = name_of(exchange.kind);
  if ((mask >> lane & 1) == 0) {
    throw Failure(Wait{what, place, mask}.describe() + ": the calling lane is not in the mask");
  }
  const bool orders_memory = exchange.kind == Exchange::Kind::kNone;
  Order* order = nullptr;
  {
    const Unseen unseen;
    yields_in_a_row_ = 0;
    Warp& warp = thread.block->warps[warp_rank];
    Meeting& meeting = join(warp, mask, lane, place);
    order = meeting.order;
    thread.wait = {what, place, mask};
    thread.exchange = exchange;
    thread.state = Thread::State::kWaiting;
    if (orders_memory) order->release();
    close_if_complete(*thread.block, warp_rank, static_cast<std::size_t>(&meeting - &warp.open[0]));
  }
  pause();
  if (orders_memory) order->acquire();
}

// CUDA waits for the lanes of the mask that have not returned; the last warp may have fewer
// than 32.
void Machine::close_if_complete(Block& block, unsigned warp_rank, std::size_t index) {
  Warp& warp = block.warps[warp_rank];
  const Meeting meeting = warp.open[index];
  if ((meeting.mask & warp.live & ~meeting.arrived) != 0) return;
  warp.open.erase(warp.open.begin() + static_cast<std::ptrdiff_t>(index));
  warp.odd ^= 1u << std::countr_zero(meeting.mask);
  Thread* lanes = &block.threads[std::size_t{warp_rank} * warpSize];
  switch (lanes[std::countr_zero(meeting.arrived)].exchange.kind) {
    case Exchange::Kind::kShuffle:
      shuffle_among(lanes, meeting.arrived);
      break;
    case Exchange::Kind::kBallot:
      vote_among(lanes, meeting.arrived);
      break;
    case Exchange::Kind::kNone:
      break;
  }
  for (unsigned rest = meeting.arrived; rest != 0; rest &= rest - 1) {
    wake(lanes[std::countr_zero(rest)]);
  }
}

// A lane that has returned is waited for no longer.
void Machine::leave_warp(Thread& thread) {
  const unsigned warp_rank = thread.rank / warpSize;
  Warp& warp = thread.block->warps[warp_rank];
  warp.live &= ~(1u << thread.rank % warpSize);
  for (std::size_t i = warp.open.size(); i-- > 0;) close_if_complete(*thread.block, warp_rank, i);
}

}  // namespace emulation
