#include "core/plan_cuda.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace batchnorm {
namespace {

// Nothing below was measured on a device yet: each threshold states the arithmetic it rests on.

// Two blocks on a multiprocessor: while one waits at a barrier the other moves data. Kernels keep
// to 128 registers a thread for it; in double they need more, and one block stays alone.
constexpr int kBlocksPerMultiprocessor = 2;
// A row of fewer bytes wastes part of each memory access: device memory is filled in pieces of 64
// bytes, and neighbouring units are rarely at work at the same time.
constexpr std::int64_t kRowBytes = 256;
// Where few images make small units, so many of them are kept before they are joined: one for each
// multiprocessor of a large device.
constexpr std::int64_t kFewestUnits = 128;
// Widths to choose from for a group of channels that lie side by side, widest first, and percent of
// the time that the widest takes. Known of one H100 is that 128 bytes cost 6 to 7 percent; 64 are
// the piece that memory is filled in, so they are put at the double.
struct Group {
  std::int64_t bytes, percent;
};
constexpr std::array<Group, 3> kGroups = {{{256, 100}, {128, 107}, {64, 115}}};
// Groups begin at multiples of so many bytes: a sector of a cache line has one owner.
constexpr std::int64_t kSectorBytes = 32;
// A further block should have at least so many bytes of each tensor for each thread: its start, its
// barrier and the exchange take about as long as moving them, 2 us: a full device (264 blocks of
// 256 threads) reads and writes 64 bytes for each thread in that time at 4.3 TB/s. The grid's
// barrier takes as long again.
constexpr std::int64_t kPauseBytes = 64;
// So many tenths of a full device's blocks move as much as all of them: 64 bytes on their way for
// each of a block's 256 threads, and 700 ns until they arrive, are 23 GB/s for each block.
constexpr std::int64_t kSaturatingTenths = 7;
// So many tenths of the second-level cache are taken to serve a second reading; stores, other
// tensors and what is held twice (Hopper's cache has two halves) have the rest.
constexpr std::int64_t kCacheTenths = 6;
// Blocks for each place on the device where blocks need not meet: enough for an even end. Each
// should have as many times the cells of a pause, or its start would take a fifth of its time or
// more.
constexpr std::int64_t kTurns = 4;
constexpr std::int64_t kMaxGrid = 2147483647;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

struct Planner {
  const CudaRequest& request;
  const DeviceLimits& device;
  const Occupancy& occupancy;
  const CudaPlanOverride& forced;
  const Problem& p;
  Traversal traversal;
  std::int64_t unit_channels = 1;

  std::int64_t element() const { return size_of(p.dtype); }
  int accumulate_size() const { return p.dtype == DType::kDouble ? 8 : 4; }
  std::int64_t kept_tensors() const { return request.pass == Pass::kBackward ? 2 : 1; }
  std::int64_t units() const { return divide_up(p.c, unit_channels); }
  // Bytes of a slot of all of a block's threads.
  std::int64_t slot_bytes() const {
    return kCudaThreads * kCellElements * element() * kept_tensors();
  }
  std::int64_t scratch_bytes() const {
    return cuda_scratch(p, traversal.mapping, unit_channels).bytes(accumulate_size());
  }
  bool may_cooperate() const { return device.cooperative && !occupancy.refused; }
  // At once. A cluster's blocks have one wave: in a second they would write over what others may
  // still read.
  std::int64_t clusters(int size) const {
    return units() <= kMaxGrid / size ? occupancy.clusters[size] : 0;
  }
  // Blocks on the device at once: of any kind, and in clusters.
  std::int64_t places() const { return std::int64_t{device.multiprocessors} * occupancy.blocks; }
  std::int64_t places_of(int cluster) const {
    return cluster == 1 ? places() : cluster * clusters(cluster);
  }
  // The largest cluster that the device takes, of at most so many blocks; 1 is none.
  int cluster_of(std::int64_t at_most) const {
    int size = static_cast<int>(std::min<std::int64_t>(at_most, kLargestCluster));
    while (size > 1 && clusters(size) == 0) --size;
    return std::max(size, 1);
  }

  std::int64_t room() const { return shared_room(device, occupancy.blocks); }
  std::int64_t slots() const {
    return std::max<std::int64_t>((room() - scratch_bytes()) / slot_bytes(), 0);
  }

  // The most cells that a thread of a team of so many blocks gets.
  std::int64_t cells(std::int64_t team) const {
    if (traversal.mapping == Mapping::kPlanes) {
      return divide_up(p.n * divide_up(p.s, kCellElements), kCudaThreads * team);
    }
    const std::int64_t width = unit_channels * columns_per_channel(p);
    const std::int64_t groups = kCudaThreads / divide_up(width, kCellElements);  // of rows
    return divide_up(matrix_rows(p), groups * team);
  }
  // Cells that a thread moves in the time of a pause.
  std::int64_t pause() const {
    return std::max<std::int64_t>(kPauseBytes / (kCellElements * element()), 1);
  }
  // The largest team whose blocks all have enough to do; more where a block holds less than that.
  std::int64_t useful_team() const {
    const std::int64_t each = std::clamp<std::int64_t>(slots(), 1, pause());
    return std::max<std::int64_t>(cells(1) / each, 1);
  }

  // Tenths of the time in which each thread of a full device moves one cell, for blocks that pause
  // so often and of which each takes the place of another, of as many as are at work at once.
  std::int64_t time_of(std::int64_t blocks, std::int64_t at_once, std::int64_t cells_each,
                       std::int64_t pauses) const {
    const std::int64_t rest = blocks % at_once;
    const std::int64_t last =
        rest == 0 ? 0 : std::max(divide_up(10 * rest, places()), kSaturatingTenths);
    return (10 * (blocks / at_once) + last) * cells_each +
           10 * divide_up(blocks, at_once) * pauses * pause();
  }

  // A way to work on units that stay on the chip. team 0: there is none.
  struct Way {
    Strategy strategy;
    std::int64_t team, time;
  };

  // Blocks that meet without the grid: the fastest team that holds its unit, of a power of 2, since
  // other clusters leave multiprocessors idle.
  Way apart() const {
    Way best = {Strategy::kBlock, 0, 0};
    if (!may_stay_apart()) return best;
    const std::int64_t held = slots(), useful = useful_team();
    for (int team = 1; team <= kLargestCluster; team *= 2) {
      const std::int64_t each = cells(team), at_once = places_of(team);
      if (each > held || at_once == 0) continue;
      if (best.team > 0 && team > useful) break;
      const std::int64_t time = time_of(units() * team, at_once, each, 1);
      if (best.team > 0 && time >= best.time) continue;
      best = {team == 1 ? Strategy::kBlock : Strategy::kCluster, team, time};
    }
    return best;
  }

  // How many units the whole device holds at once.
  std::int64_t grid_units() const {
    const std::int64_t teams_of = divide_up(cells(1), std::max<std::int64_t>(slots(), 1));
    return std::min(places() / std::max<std::int64_t>(teams_of, 1), units());
  }
  // Waves of equal size: how many units of `at_once` are in each.
  std::int64_t even_wave(std::int64_t at_once) const {
    return divide_up(units(), divide_up(units(), at_once));
  }
  Way together() const {
    const std::int64_t held = may_cooperate() ? grid_units() : 0;
    if (held == 0) return {Strategy::kGrid, 0, 0};
    const std::int64_t at_once = even_wave(held);
    const std::int64_t team = std::min(useful_team(), places() / at_once);
    const std::int64_t pauses = shares_out(Strategy::kGrid, team, unit_channels) ? 3 : 2;
    return {Strategy::kGrid, team,
            divide_up(units(), at_once) * time_of(at_once * team, places(), cells(team), pauses)};
  }

  // The times are rough, and a cooperative launch keeps others off the device: together only where
  // that saves a fifth.
  Way resident() const {
    const Way first = apart(), second = together();
    if (first.team == 0) return second;
    return second.team > 0 && 5 * second.time < 4 * first.time ? second : first;
  }

  void choose_unit() {
    if (p.layout == Layout::kChannelsFirst) {
      unit_channels = std::max<std::int64_t>(expanded_channels(p), 1);
      return;
    }
    if (forced.unit_channels <= 0) {
      unit_channels = group_of_channels();
      return;
    }
    unit_channels =
        std::min({round_up(forced.unit_channels, kCellElements), p.c, std::int64_t{kCudaThreads}});
    while (scratch_bytes() > room()) {
      unit_channels = round_up(unit_channels / 2, kCellElements);
    }
  }

  // Whether the second-level cache keeps what a unit leaves beside all blocks' shared memory.
  bool is_cached() const {
    const std::int64_t left = std::max<std::int64_t>(cells(places()) - slots(), 0);
    return left * places() * slot_bytes() <= device.l2 * kCacheTenths / 10;
  }

  // No wider than asked for; groups of about one size, since the narrowest would be the slowest.
  std::int64_t group_of(std::int64_t bytes) const {
    const std::int64_t widest = std::max(bytes / element(), std::int64_t{kCellElements});
    const std::int64_t step = std::max(kSectorBytes / element(), std::int64_t{kCellElements});
    return std::min(round_up(divide_up(p.c, divide_up(p.c, widest)), step), p.c);
  }

  // Channels-last: the fastest of the groups that stay in shared memory, else the widest that stays
  // on the chip with the cache's help, else the widest.
  std::int64_t group_of_channels() {
    const std::int64_t widest = group_of(kGroups.front().bytes);
    if (!request.reduces) return widest;
    std::int64_t best = 0, best_time = 0, cached = 0;
    for (const Group& group : kGroups) {
      unit_channels = group_of(group.bytes);
      if (cached == 0 && may_cooperate() && is_cached()) cached = unit_channels;
      const Way way = resident();
      const std::int64_t time = way.time * group.percent;
      if (way.team == 0 || (best > 0 && time >= best_time)) continue;
      best = unit_channels;
      best_time = time;
    }
    if (best > 0) return best;
    return cached > 0 ? cached : widest;
  }

  // With a cumulative average the blocks that write running statistics read the counter before one
  // of them writes it: either there is one such block, or all meet.
  bool may_stay_apart() const { return !request.cumulative || units() == 1; }

  Strategy choose_strategy(std::int64_t* team) const {
    if (!request.reduces) return Strategy::kSinglePass;
    const Way way = resident();
    *team = std::max<std::int64_t>(way.team, 1);
    if (way.team > 0) return way.strategy;
    return may_cooperate() ? Strategy::kGrid : Strategy::kTwoKernels;
  }

  bool can_follow(Strategy wanted) const {
    if (!request.reduces) return false;
    switch (wanted) {
      case Strategy::kBlock:
        return may_stay_apart();
      case Strategy::kCluster:
        return may_stay_apart() && cluster_of(kLargestCluster) > 1;
      case Strategy::kGrid:
        return may_cooperate();
      default:
        return wanted == Strategy::kTwoKernels;
    }
  }

  // Blocks where nothing stays on the chip: so many that the device is full, in several turns where
  // each block has enough to do that its start does not count. Rounded down, since a few blocks
  // more would have a turn of their own.
  std::int64_t spread_team() const {
    const std::int64_t full = std::min(places() / units(), useful_team());
    const std::int64_t turns = std::min(kTurns * places() / units(), cells(1) / (kTurns * pause()));
    return std::max({full, turns, std::int64_t{1}});
  }

  void cut(CudaPlan* plan) const {
    if (plan->strategy == Strategy::kGrid) return cut_grid(plan);
    plan->units_at_once = std::min(units(), kMaxGrid / plan->team);
    if (forced.units_at_once > 0 && plan->strategy != Strategy::kCluster) {
      plan->units_at_once = std::min(forced.units_at_once, units());
    }
    const bool keeps = plan->strategy == Strategy::kBlock || plan->strategy == Strategy::kCluster;
    plan->slots = keeps ? static_cast<int>(std::min(slots(), cells(plan->team))) : 0;
  }

  // Waves of equal size, each as large as the device holds. A unit that it does not hold has all.
  void cut_grid(CudaPlan* plan) const {
    std::int64_t at_once = std::clamp<std::int64_t>(grid_units(), 1, units());
    if (forced.units_at_once > 0) at_once = std::min({forced.units_at_once, units(), places()});
    at_once = even_wave(at_once);
    const std::int64_t most = places() / at_once;
    const std::int64_t wanted = forced.team > 0 ? forced.team : useful_team();
    plan->units_at_once = at_once;
    plan->team = static_cast<int>(std::min(wanted, most));
    plan->slots = static_cast<int>(std::min(slots(), cells(plan->team)));
  }

  std::int64_t workspace_bytes(const CudaPlan& plan) const {
    const std::int64_t unit = plan.team * kPartialValues * unit_channels * accumulate_size();
    if (plan.strategy == Strategy::kTwoKernels) return plan.units * unit;
    // Two waves' partial results exist at a time.
    if (plan.strategy == Strategy::kGrid) return 2 * plan.units_at_once * unit;
    return 0;
  }

  void predict(CudaPlan* plan) const {
    const std::int64_t tensor = p.numel() * element();
    const std::int64_t bits = request.masked ? mask_rows(p) * mask_row_bytes(p) : 0;
    const std::int64_t streams = kept_tensors() + (request.residual ? 1 : 0) + request.outputs;
    plan->compulsory_bytes = streams * tensor + bits;
    plan->predicted_bytes = plan->compulsory_bytes;
    if (!request.reduces) return;
    if (request.pass == Pass::kBackward && request.outputs == 0) return;  // no second pass
    const std::int64_t all = cells(plan->team);
    const std::int64_t again = all - std::min<std::int64_t>(plan->slots, all);
    plan->predicted_bytes += kept_tensors() * tensor / all * again;
    // Backward needs z again, so what it is made of.
    if (request.pass == Pass::kBackward) {
      plan->predicted_bytes += (request.residual ? tensor : 0) + bits;
    }
  }

  CudaPlan plan() {
    choose_unit();
    CudaPlan plan{};
    std::int64_t team = 1;
    plan.strategy = choose_strategy(&team);
    if (forced.strategy >= 0 && can_follow(static_cast<Strategy>(forced.strategy))) {
      plan.strategy = static_cast<Strategy>(forced.strategy);
      team = plan.strategy == Strategy::kCluster ? cluster_of(2) : 1;
    }
    if (plan.strategy == Strategy::kSinglePass || plan.strategy == Strategy::kTwoKernels) {
      team = spread_team();
    }
    if (forced.team > 0 && plan.strategy != Strategy::kBlock) {
      team = plan.strategy == Strategy::kCluster ? cluster_of(forced.team)
                                                 : std::min(forced.team, kCudaThreads);
    }
    plan.team = static_cast<int>(std::max<std::int64_t>(team, 1));
    plan.mapping = traversal.mapping;
    plan.access = traversal.access;
    plan.refused = occupancy.refused;
    plan.unit_channels = unit_channels;
    plan.units = units();
    cut(&plan);
    if (forced.slots >= 0) plan.slots = std::min(plan.slots, forced.slots);
    plan.shared_bytes = plan.slots * slot_bytes() + scratch_bytes();
    plan.workspace_bytes = workspace_bytes(plan);
    predict(&plan);
    // What would not stay in the second-level cache anyway should not drive out what is read again.
    plan.stream_stores =
        forced.stream_stores < 0 ? plan.compulsory_bytes > device.l2 : forced.stream_stores > 0;
    return plan;
  }
};

}  // namespace

std::int64_t expanded_channels(const Problem& p) {
  if (p.layout != Layout::kChannelsFirst || p.c * p.s % kCellElements != 0) return 0;
  // Whole cells in each row; a thread at most for each channel, to make its parameters.
  const std::int64_t widest = std::int64_t{kCudaThreads} * kCellElements;
  const std::int64_t step = kCellElements / std::gcd(p.s, std::int64_t{kCellElements});
  const std::int64_t most = std::min({widest / p.s, std::int64_t{kCudaThreads}, p.c}) / step * step;
  const std::int64_t long_rows = divide_up(kRowBytes, p.s * size_of(p.dtype));
  // A cell for each thread, as long as units are plenty.
  const std::int64_t busy = std::min(divide_up(widest, p.n * p.s), p.c / kFewestUnits);
  const std::int64_t found = std::min(round_up(std::max(long_rows, busy), step), most);
  // One plane alone is not a matrix, unless nothing else could be: it is walked as it lies.
  return found > 1 ? found : 0;
}

Traversal traversal_of(const CudaRequest& request, const CudaPlanOverride& forced) {
  const Problem& p = request.problem;
  const bool first = p.layout == Layout::kChannelsFirst;
  const bool planes = first && expanded_channels(p) == 0;
  const std::int64_t row = planes ? p.s : first ? p.c * p.s : p.c;
  const bool scalar = forced.access == static_cast<int>(Access::kScalar);
  const bool vector = request.aligned && row % kCellElements == 0;
  return {planes ? Mapping::kPlanes : Mapping::kColumns,
          vector && !scalar ? Access::kVector : Access::kScalar};
}

std::int64_t shared_room(const DeviceLimits& device, int blocks) {
  const std::int64_t share = device.shared_per_multiprocessor / blocks;
  return std::min(share - device.reserved_shared, device.shared_per_block);
}

Occupancy assumed_occupancy(DType dtype, const DeviceLimits& device) {
  Occupancy result;
  result.blocks = std::min(dtype == DType::kDouble ? 1 : kBlocksPerMultiprocessor,
                           device.threads_per_multiprocessor / kCudaThreads);
  for (int size = 2; size <= std::min(device.max_cluster, kLargestCluster); ++size) {
    result.clusters[size] = device.multiprocessors * result.blocks / size;
  }
  return result;
}

CudaPlan plan_cuda(const CudaRequest& request, const DeviceLimits& device,
                   const Occupancy& occupancy, const CudaPlanOverride& forced) {
  Planner planner{request, device,          occupancy,
                  forced,  request.problem, traversal_of(request, forced)};
  return planner.plan();
}

}  // namespace batchnorm
