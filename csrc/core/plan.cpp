#include "core/plan.h"

#include <algorithm>
#include <numeric>

namespace batchnorm {
namespace {

// An estimate: waking a second thread takes about 2 us, in which one thread writes 32 K elements.
constexpr std::int64_t kElementsPerThread = 32 * 1024;
// Arithmetic: rows this long use every set of a first-level cache, whatever their stride. In units
// of 1 channel instead of 16 (0.2 KB instead of 3 KB), 128x512x7x7 took 2.6 instead of 1.5 ms.
constexpr std::int64_t kRowBytes = 4096;
// Planes of neighbouring channels are walked together up to such a length, if the second-level
// cache holds them: fewer page walks, fewer restarts of the prefetchers. Measured within the noise.
constexpr std::int64_t kRunBytes = 64 * 1024;
// Columns are split for the last-level cache only into groups this wide. Groups of 256 bytes cost
// more than the second pass from memory: 64x96x28x28 channels-last took 3.6 ms, unsplit 2.7.
constexpr std::int64_t kGroupBytes = 2048;
// Columns of a vector, and of whole bytes of the mask.
constexpr std::int64_t kVector = 16;
// Arithmetic: the double-precision sums of so many columns (64 KB) leave room in a second-level
// cache.
constexpr std::int64_t kMaxColumns = 4096;
// Arithmetic: a block of the vector kernels, 4 vectors of 16.
constexpr std::int64_t kMinColumns = 64;
// Planes of at most this many elements, and at most so many for each n, are reduced as columns over
// n: rows enough to pay for combining the columns of a channel. Measured on float32, forward, one
// thread, as columns and as runs: 0.16 and 0.11 ms for 8x256x14x14, 0.42 and 0.51 for 32x256x14x14,
// 0.07 and 0.13 for 8x512x7x7.
constexpr std::int64_t kMaxExpandedPlane = 512;
constexpr std::int64_t kExpandedPerRow = 8;
// Without a reduction, runs win from smaller planes on: 0.05 against 0.07 ms for 8x256x14x14, but
// 0.11 against 0.08 for 32x256x10x10.
constexpr std::int64_t kMaxExpandedEvalPlane = 128;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

struct Planner {
  const Problem& p;
  const CacheSizes& caches;
  int threads;
  bool masked;
  std::int64_t channel_bytes;  // of all tensors that a reduction reads

  // Half of a cache is what its contents can count on.
  std::int64_t l2_budget() const { return caches.l2 / 2; }
  std::int64_t l3_budget() const { return caches.l3 / 2; }
  std::int64_t element() const { return size_of(p.dtype); }

  std::int64_t fold() const {
    if (masked || p.c >= kMinColumns) return 1;
    const std::int64_t whole_vectors = kVector / std::gcd(kVector, p.c);
    const std::int64_t rows = whole_vectors * divide_up(kMinColumns, p.c * whole_vectors);
    return rows <= p.n * p.s ? rows : 1;
  }

  bool balanced(std::int64_t units) const { return units % threads == 0 || units >= 4 * threads; }

  CpuPlan columns() const {
    CpuPlan plan{Scheme::kColumns, true, false, threads, p.c, fold()};
    if (plan.fold > 1) return plan;
    const std::int64_t per_thread = round_up(divide_up(p.c, threads), kVector);
    const std::int64_t wide = std::max(kMinColumns, kRowBytes / element());
    const bool all_in_l2 = channel_bytes * p.c <= l2_budget() * threads;
    if (all_in_l2 && per_thread <= kMaxColumns && p.c >= kMinColumns * threads) {
      plan.cooperative = threads == 1;
      plan.unit_channels = per_thread;
    } else if (channel_bytes * wide <= l2_budget() && p.c >= wide * threads) {
      plan.cooperative = false;
      plan.unit_channels = wide;
    } else {
      // As many columns as the last-level cache keeps for the second pass; all of them where that
      // would be too narrow a group.
      const std::int64_t step = kGroupBytes / element();
      const std::int64_t kept = l3_budget() / std::max<std::int64_t>(channel_bytes, 1);
      plan.unit_channels = kept < step ? p.c : std::min(p.c, kept / step * step);
    }
    plan.unit_channels = std::min({plan.unit_channels, kMaxColumns, p.c});
    return plan;
  }

  // Nothing to reduce, so everything goes in the order of memory.
  CpuPlan single_pass(CpuPlan plan) const {
    if (plan.scheme == Scheme::kExpanded && p.s <= kMaxExpandedEvalPlane) return plan;
    if (p.layout == Layout::kChannelsFirst) plan.scheme = Scheme::kPlanes;
    plan.cooperative = true;
    plan.unit_channels = p.c;
    return plan;
  }

  CpuPlan planes() const {
    CpuPlan plan{Scheme::kPlanes, false, false, threads, 1, 1};
    const std::int64_t long_runs = divide_up(kRunBytes, p.s * element());
    plan.unit_channels = std::max<std::int64_t>(
        std::min({long_runs, p.c / (4 * threads), l2_budget() / channel_bytes}), 1);
    if (!masked && p.s <= std::min(kMaxExpandedPlane, kExpandedPerRow * p.n)) {
      plan.scheme = Scheme::kExpanded;
      const std::int64_t wanted = round_up(divide_up(kRowBytes, p.s * element()), 8);
      const std::int64_t most = std::max<std::int64_t>(kMaxColumns / p.s, 1);
      plan.unit_channels = std::min({wanted, most, divide_up(p.c, threads)});
    }
    const bool kept = channel_bytes * plan.unit_channels * threads <= l3_budget();
    if (kept && balanced(divide_up(p.c, plan.unit_channels))) return plan;
    plan.cooperative = true;
    if (plan.scheme == Scheme::kPlanes) {
      plan.unit_channels = std::clamp(l3_budget() / channel_bytes, std::int64_t{1}, p.c);
    }
    return plan;
  }
};

void apply(const PlanOverride& forced, const Problem& p, bool masked, CpuPlan* plan) {
  if (forced.scheme >= 0 && p.layout == Layout::kChannelsFirst && !masked) {
    plan->scheme =
        forced.scheme == static_cast<int>(Scheme::kExpanded) ? Scheme::kExpanded : Scheme::kPlanes;
  }
  if (forced.cooperative >= 0) plan->cooperative = forced.cooperative != 0;
  if (forced.stream >= 0) plan->stream = forced.stream != 0;
  if (forced.unit_channels > 0) {
    // Groups of 8 columns own whole bytes of the mask.
    const std::int64_t wanted = masked ? round_up(forced.unit_channels, 8) : forced.unit_channels;
    plan->unit_channels = std::min(wanted, p.c);
  }
  if (forced.fold > 0 && p.layout == Layout::kChannelsLast && !masked) {
    plan->fold = std::min(forced.fold, p.n * p.s);
  }
  if (plan->fold > 1) plan->unit_channels = p.c;  // a folded row holds all channels
}

}  // namespace

CpuPlan plan_cpu(const Problem& problem, Pass pass, bool masked, int threads,
                 const CacheSizes& caches, const PlanOverride& forced) {
  const std::int64_t useful = divide_up(problem.numel(), kElementsPerThread);
  const int used = forced.threads > 0
                       ? forced.threads
                       : static_cast<int>(std::clamp<std::int64_t>(useful, 1, threads));
  const std::int64_t reads = pass == Pass::kBackward ? 2 : 1;
  const std::int64_t channel_bytes = problem.per_channel() * size_of(problem.dtype) * reads;
  const Planner planner{problem, caches, used, masked, channel_bytes};
  CpuPlan plan = problem.layout == Layout::kChannelsLast ? planner.columns() : planner.planes();
  if (pass == Pass::kEval) plan = planner.single_pass(plan);
  // What is written can only stay in a cache that holds what is read beside it.
  plan.stream = (reads + 1) * problem.numel() * size_of(problem.dtype) > caches.l3;
  apply(forced, problem, masked, &plan);
  return plan;
}

}  // namespace batchnorm
