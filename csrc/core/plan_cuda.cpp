#include "core/plan_cuda.h"

#include <algorithm>
#include <array>

namespace batchnorm {
namespace {

// Nothing below was measured on a device yet: each threshold states the arithmetic it rests on.

// Two blocks on a multiprocessor: while one waits at a barrier the other moves data. Kernels keep
// to 128 registers a thread for it; in double they need more, and one block stays alone.
constexpr int kBlocksPerMultiprocessor = 2;
// A row of fewer bytes wastes part of each memory access: device memory is filled in pieces of 64
// bytes, and neighbouring units are rarely at work at the same time.
constexpr std::int64_t kRowBytes = 256;
// Widths to choose from for a group of channels that lie side by side, widest first.
constexpr std::array<std::int64_t, 3> kGroupBytes = {256, 128, 64};
// A further block should have at least so many cells for each thread: its start, its barrier and
// the exchange take about as long as reading them.
constexpr std::int64_t kCellsPerThread = 4;
// Blocks for each place on the device where blocks need not meet: enough for an even end.
constexpr std::int64_t kWavesOfBlocks = 4;
constexpr std::int64_t kMaxGrid = 2147483647;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

struct Planner {
  const CudaRequest& request;
  const DeviceLimits& device;
  const CudaPlanOverride& forced;
  const Problem& p;
  Mapping mapping = Mapping::kColumns;
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
    return cuda_scratch(p, mapping, unit_channels).bytes(accumulate_size());
  }
  std::int64_t blocks_per_multiprocessor() const {
    const std::int64_t wanted = p.dtype == DType::kDouble ? 1 : kBlocksPerMultiprocessor;
    return std::min<std::int64_t>(wanted, device.threads_per_multiprocessor / kCudaThreads);
  }
  std::int64_t places() const { return device.multiprocessors * blocks_per_multiprocessor(); }

  // Slots that fit beside the scratch if so many blocks share a multiprocessor.
  std::int64_t slots_that_fit(std::int64_t blocks) const {
    const std::int64_t share = device.shared_per_multiprocessor / blocks - device.reserved_shared;
    const std::int64_t room = std::min(share, device.shared_per_block) - scratch_bytes();
    return std::max<std::int64_t>(room / slot_bytes(), 0);
  }
  std::int64_t slots() const { return slots_that_fit(blocks_per_multiprocessor()); }

  // The most cells that a thread of a team of so many blocks gets.
  std::int64_t cells(std::int64_t team) const {
    if (mapping == Mapping::kPlanes) {
      return divide_up(p.n * divide_up(p.s, kCellElements), kCudaThreads * team);
    }
    const std::int64_t width = unit_channels * columns_per_channel(p);
    const std::int64_t groups = kCudaThreads / divide_up(width, kCellElements);  // of rows
    return divide_up(matrix_rows(p), groups * team);
  }
  // The largest team whose blocks all have enough to do; more where a block holds less than that.
  std::int64_t useful_team() const {
    const std::int64_t each = std::clamp<std::int64_t>(slots(), 1, kCellsPerThread);
    return std::max<std::int64_t>(cells(1) / each, 1);
  }

  // Blocks of a team that holds its unit, no more than `most`, so that all units' blocks fill the
  // device: powers of 2, since other clusters leave multiprocessors idle. 0: it never fits.
  std::int64_t resident_team(std::int64_t most) const {
    std::int64_t team = 1;
    while (team <= most && cells(team) > slots()) team *= 2;
    if (team > most) return 0;
    while (2 * team <= std::min(most, useful_team()) && units() * team < places()) team *= 2;
    return team;
  }

  // How many units the whole device holds at once.
  std::int64_t grid_units() const {
    const std::int64_t teams_of = divide_up(cells(1), std::max<std::int64_t>(slots(), 1));
    return std::min(places() / std::max<std::int64_t>(teams_of, 1), units());
  }

  void choose_mapping() {
    if (p.layout == Layout::kChannelsFirst) {
      unit_channels = expanded_channels(p);
      if (unit_channels == 0) {
        mapping = Mapping::kPlanes;
        unit_channels = 1;
      }
      return;
    }
    if (forced.unit_channels > 0) {
      unit_channels = std::min({round_up(forced.unit_channels, kCellElements), p.c,
                                std::int64_t{kCudaThreads} * kCellElements});
      return;
    }
    unit_channels = group_of_channels();
  }

  // Channels-last: as wide as can be while a unit stays on the chip, for fewer and longer accesses.
  std::int64_t group_of_channels() {
    const auto width = [&](std::int64_t bytes) {
      return std::min(std::max<std::int64_t>(bytes / element(), kCellElements), p.c);
    };
    if (!request.reduces) return width(kGroupBytes.front());
    const std::int64_t most = device.max_cluster;
    for (const bool whole_grid : {false, true}) {
      for (const std::int64_t bytes : kGroupBytes) {
        unit_channels = width(bytes);
        const std::int64_t team = resident_team(most);
        if (!whole_grid && team > 0 && units() * team >= device.multiprocessors) {
          return unit_channels;
        }
        if (whole_grid && device.cooperative && grid_units() > 0) return unit_channels;
      }
    }
    // It does not fit at all, or fits into a few blocks however it is cut.
    for (const std::int64_t bytes : {kGroupBytes.back(), kGroupBytes.front()}) {
      unit_channels = width(bytes);
      if (resident_team(most) > 0) return unit_channels;
    }
    return unit_channels;
  }

  // With a cumulative average the blocks that write running statistics read the counter before one
  // of them writes it: either there is one such block, or all meet.
  bool may_stay_apart() const { return !request.cumulative || units() == 1; }

  Strategy choose_strategy(std::int64_t* team) const {
    if (!request.reduces) return Strategy::kSinglePass;
    *team = may_stay_apart() ? resident_team(device.max_cluster) : 0;
    if (*team == 1) return Strategy::kBlock;
    if (*team > 1) return Strategy::kCluster;
    return device.cooperative ? Strategy::kGrid : Strategy::kTwoKernels;
  }

  bool can_follow(Strategy wanted) const {
    if (!request.reduces) return false;
    switch (wanted) {
      case Strategy::kBlock:
        return may_stay_apart();
      case Strategy::kCluster:
        return may_stay_apart() && device.max_cluster > 1;
      case Strategy::kGrid:
        return device.cooperative;
      default:
        return wanted == Strategy::kTwoKernels;
    }
  }

  bool is_vector() const {
    const std::int64_t row = mapping == Mapping::kPlanes          ? p.s
                             : p.layout == Layout::kChannelsFirst ? p.c * p.s
                                                                  : p.c;
    return request.aligned && row % kCellElements == 0;
  }

  // Blocks that fill the device where nothing stays on the chip.
  std::int64_t spread_team() const {
    const std::int64_t wanted = divide_up(kWavesOfBlocks * places(), units());
    return std::clamp<std::int64_t>(wanted, 1, useful_team());
  }

  void cut(CudaPlan* plan) const {
    if (plan->strategy == Strategy::kGrid) return cut_grid(plan);
    plan->units_at_once = std::min(units(), kMaxGrid / plan->team);
    if (forced.units_at_once > 0) plan->units_at_once = std::min(forced.units_at_once, units());
    const bool keeps = plan->strategy == Strategy::kBlock || plan->strategy == Strategy::kCluster;
    plan->slots = keeps ? static_cast<int>(std::min(slots(), cells(plan->team))) : 0;
  }

  // Waves of equal size, each as large as the device holds. A unit that it does not hold has all.
  void cut_grid(CudaPlan* plan) const {
    std::int64_t at_once = std::clamp<std::int64_t>(grid_units(), 1, units());
    if (forced.units_at_once > 0) at_once = std::min({forced.units_at_once, units(), places()});
    at_once = divide_up(units(), divide_up(units(), at_once));
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
    choose_mapping();
    CudaPlan plan{};
    std::int64_t team = 1;
    plan.strategy = choose_strategy(&team);
    if (forced.strategy >= 0 && can_follow(static_cast<Strategy>(forced.strategy))) {
      plan.strategy = static_cast<Strategy>(forced.strategy);
      team = plan.strategy == Strategy::kCluster ? std::clamp(device.max_cluster, 1, 2) : 1;
    }
    if (plan.strategy == Strategy::kSinglePass || plan.strategy == Strategy::kTwoKernels) {
      team = spread_team();
    }
    if (forced.team > 0 && plan.strategy != Strategy::kBlock) {
      const int most = plan.strategy == Strategy::kCluster ? device.max_cluster : kCudaThreads;
      team = std::min(forced.team, most);
    }
    plan.team = static_cast<int>(std::max<std::int64_t>(team, 1));
    plan.mapping = mapping;
    plan.access = is_vector() ? Access::kVector : Access::kScalar;
    if (forced.access >= 0 && static_cast<Access>(forced.access) == Access::kScalar) {
      plan.access = Access::kScalar;
    }
    plan.unit_channels = unit_channels;
    plan.units = units();
    cut(&plan);
    if (forced.slots >= 0) plan.slots = std::min(plan.slots, forced.slots);
    plan.shared_bytes = plan.slots * slot_bytes() + scratch_bytes();
    plan.workspace_bytes = workspace_bytes(plan);
    predict(&plan);
    // What would not stay in the second-level cache anyway should not drive out what is read again.
    plan.stream_stores = plan.compulsory_bytes > device.l2;
    return plan;
  }
};

}  // namespace

std::int64_t expanded_channels(const Problem& p) {
  if (p.layout != Layout::kChannelsFirst) return 0;
  const std::int64_t widest = std::int64_t{kCudaThreads} * kCellElements;
  std::int64_t found = 0;
  for (std::int64_t k = 1; k <= p.c && k * p.s <= widest; ++k) {
    if (p.c % k != 0 || k * p.s % kCellElements != 0) continue;
    found = k;
    if (k * p.s * size_of(p.dtype) >= kRowBytes) break;
  }
  // One plane alone is not a matrix, unless nothing else could be: it is walked as it lies.
  return found > 1 ? found : 0;
}

CudaPlan plan_cuda(const CudaRequest& request, const DeviceLimits& device,
                   const CudaPlanOverride& forced) {
  Planner planner{request, device, forced, request.problem};
  return planner.plan();
}

}  // namespace batchnorm
