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
// Planes of neighbouring channels are walked together up to such a length, also where that is more
// than a second-level cache holds: fewer page walks, fewer restarts of the prefetchers. Units of
// 10, 16 and 64 channels of 64x256x14x14 (0.5 to 3.2 MB) took 1.5, 1.25 and 0.92 ms
// forward, 2.5, 2.0 and 1.6 backward (float32, AVX2, one thread).
// Where an image has no such length for each thread, the threads share images instead, half of them
// each: 512x8x27x28 took 1.16 and 0.82 ms forward, 1.46 and 1.23 backward, 64x16x28x28 125 and 102,
// 210 and 180 us (float32, AVX2, two threads, after another operator).
constexpr std::int64_t kRunBytes = 64 * 1024;
// Columns are split for the last-level cache only into groups this wide. Groups of 256 bytes cost
// more than the second pass from memory: 64x96x28x28 channels-last took 3.6 ms, unsplit 2.7.
constexpr std::int64_t kGroupBytes = 2048;
// Of few rows each thread has columns of its own, since the work for each channel and the waiting
// for each other is then most of it. Rows shared and columns of one's own took, float32, AVX2, two
// threads: 43 and 26 us forward, 30 and 20 backward for (28, 1912), 48 and 46, 92 and 72 for
// (128, 2048), 44 and 36, 89 and 68 for (256, 1024), 95 and 105 forward for (512, 1024), 11 and 13
// for (256, 128).
constexpr std::int64_t kFewRows = 256;
// Columns of a vector, and of whole bytes of the mask.
constexpr std::int64_t kVector = 16;
// Arithmetic: the double-precision sums of so many columns (64 KB) leave room in a second-level
// cache.
constexpr std::int64_t kMaxColumns = 4096;
// Arithmetic: a block of the vector kernels, 4 vectors of 16.
constexpr std::int64_t kMinColumns = 64;
// Smaller planes are seen as columns over n, where there are rows enough to pay for combining the
// columns of a channel: a vector of one plane would be half empty, and each plane has sums of its
// own. Planes and columns took, float32, AVX2, one thread, forward: 146 and 103 us for 64x256x6x6,
// 48 and 51 for 16x256x7x7, 187 and 157 for 64x256x7x7, 177 and 224 for 64x256x8x8.
constexpr std::int64_t kSmallPlane = 64;
constexpr std::int64_t kMinExpandedRows = 8;
// Where nothing is reduced, only planes that no vector fits in: 34 and 22 us for 64x256x3x3, 14.3
// and 15.1 for 16x256x5x5.
constexpr std::int64_t kTinyPlane = 16;
// Channels whose sums, 128 bytes each, leave room in a first-level cache.
constexpr std::int64_t kMaxKeptChannels = 128;
// Columns of a group that owns whole bytes of the mask.
constexpr std::int64_t kMaskColumns = 8;
// Stores past the caches write whole lines. Shorter planes that end inside a line leave it to be
// merged in memory: eval of float32 32x1024x14x14 took 2.8 ms with such stores, 1.6 without; of
// 64x64x55x55 (12 KB) 5.4 and 5.1.
constexpr std::int64_t kLine = 64;
constexpr std::int64_t kLongPlane = 16 * 1024;
// What a call can count on of a last-level cache, whatever the machine says that it has: others use
// it too, and what follows reads y beside its own data. Of a ResNet-50 step (batch 8, AVX2, two
// threads, an L3 of 32 MiB by its own word), batch norms take 0.85 of what they take without such
// stores, and the step as a whole 0.96 to 1.00: what reads y then finds it in memory. Inference,
// where nothing is kept for later, goes by what is reported: eval of 4x256x56x56 took 1.5 times as
// long.
constexpr std::int64_t kSharedCache = 16 << 20;

// Rows are summed up in groups, with the sums in registers meanwhile, where a thread's data are as
// near as this. From further away they come one row at a time, as prefetchers like it, with the
// sums in the first-level cache; short ones a few at a time. Groups of 8 and of 1 took, AVX2, one
// thread, float32: 120 and 158 us for 32x512x7x7 (3.2 MB), 2.5 and 1.8 ms for 8x256x56x56 (26 MB);
// backward of 32x64x112x112 in groups of 1, 2, 8, 64: 11.4, 11.4, 14.2, 15.8 ms. AVX-512 is alike,
// but milder.
constexpr std::int64_t kNearBytes = 4 << 20, kFarRowBytes = 512;
constexpr int kGroupRows = 8;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

// Half of a cache is what its contents can count on.
std::int64_t budget(std::int64_t cache) { return cache / 2; }

struct Planner {
  const Problem& p;
  const CacheSizes& caches;
  int threads;
  bool masked;
  std::int64_t channel_bytes;  // of all tensors that a reduction reads

  std::int64_t l2_budget() const { return budget(caches.l2); }
  std::int64_t l3_budget() const { return budget(caches.l3); }
  std::int64_t element() const { return size_of(p.dtype); }

  // By the shape alone, since the mask that forward writes is laid out as folded rows have it; of
  // those, each has whole bytes.
  std::int64_t fold() const {
    if (p.c >= kMinColumns) return 1;
    const std::int64_t whole_vectors = kVector / std::gcd(kVector, p.c);
    const std::int64_t rows = whole_vectors * divide_up(kMinColumns, p.c * whole_vectors);
    return rows <= p.n * p.s ? rows : 1;
  }

  bool balanced(std::int64_t units) const { return units % threads == 0 || units >= 4 * threads; }

  // Channels of units that all threads have the same number of, or many.
  std::int64_t even_units(std::int64_t channels) const {
    const std::int64_t units = divide_up(p.c, channels);
    return units < 4 * threads ? divide_up(p.c, round_up(units, threads)) : channels;
  }

  CpuPlan columns() const {
    CpuPlan plan{Scheme::kColumns, true, false, threads, p.c, fold(), 1};
    if (plan.fold > 1) return plan;
    const std::int64_t wide = std::max(kMinColumns, kRowBytes / element());
    // Threads share rows rather than have narrow columns each, where one's prefetches seem to take
    // the lines that another writes: 8x256x14x14 in bfloat16, 256 bytes each, took 33 us and 41 or
    // 159.
    const bool few_rows =
        threads > 1 && p.per_channel() <= std::min(kFewRows, p.c) && p.c >= kMinColumns * threads;
    if (channel_bytes * wide <= l2_budget() && p.c >= wide * threads) {
      plan.cooperative = false;
      plan.unit_channels = wide;
    } else if (few_rows) {
      plan.cooperative = false;
      plan.unit_channels = round_up(divide_up(p.c, threads), kMinColumns);
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
    plan.cooperative = true;
    plan.unit_channels = p.c;
    if (plan.scheme == Scheme::kExpanded && p.s < kTinyPlane) {
      plan.unit_channels = std::min(p.c, kMaxColumns / p.s);
    } else if (p.layout == Layout::kChannelsFirst) {
      plan.scheme = Scheme::kPlanes;
    }
    return plan;
  }

  // Rows that are summed up together, in registers.
  int group_rows(const CpuPlan& plan) const {
    const std::int64_t held = channel_bytes * plan.unit_channels / (plan.cooperative ? threads : 1);
    if (plan.scheme == Scheme::kPlanes || held <= kNearBytes) return kGroupRows;
    const std::int64_t columns =
        plan.unit_channels * (plan.scheme == Scheme::kExpanded ? p.s : plan.fold);
    return static_cast<int>(
        std::clamp<std::int64_t>(kFarRowBytes / (columns * element()), 1, kGroupRows));
  }

  // Images so short that threads with channels of their own would be at each other's lines.
  bool has_short_images(const CpuPlan& plan) const {
    return plan.scheme == Scheme::kPlanes && threads > 1 && p.c <= kMaxKeptChannels &&
           p.c * p.s * element() < threads * kRunBytes;
  }

  CpuPlan planes() const {
    CpuPlan plan{Scheme::kPlanes, false, false, threads, 1, 1, 1};
    const std::int64_t wanted = std::min({divide_up(kRunBytes, p.s * element()),
                                          std::max<std::int64_t>(kNearBytes / channel_bytes, 1),
                                          kMaxKeptChannels, divide_up(p.c, threads)});
    plan.unit_channels = even_units(wanted);
    // By the shape alone, since the mask that forward writes is laid out as the scheme has it.
    if (p.s < kSmallPlane && p.n >= std::max(kMinExpandedRows, p.s / 2)) {
      plan.scheme = Scheme::kExpanded;
      const std::int64_t row = round_up(divide_up(kRowBytes, p.s * element()), kMaskColumns);
      const std::int64_t most = std::max<std::int64_t>(kMaxColumns / p.s, 1);
      const std::int64_t step = masked ? kMaskColumns : 1;
      const std::int64_t each = std::min({row, most, divide_up(p.c, threads)}) / step * step;
      plan.unit_channels = std::min(std::max(each, step), p.c);
    }
    const bool kept = channel_bytes * plan.unit_channels * threads <= l3_budget();
    if (kept && balanced(divide_up(p.c, plan.unit_channels)) && !has_short_images(plan)) {
      return plan;
    }
    plan.cooperative = true;
    if (plan.scheme == Scheme::kPlanes) {
      plan.unit_channels =
          std::clamp(l3_budget() / channel_bytes, std::int64_t{1}, std::min(p.c, kMaxKeptChannels));
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
    const std::int64_t wanted =
        masked ? round_up(forced.unit_channels, kMaskColumns) : forced.unit_channels;
    plan->unit_channels = std::min(wanted, p.c);
  }
  if (forced.fold > 0 && p.layout == Layout::kChannelsLast && !masked) {
    plan->fold = std::min(forced.fold, p.n * p.s);
  }
  if (plan->fold > 1) plan->unit_channels = p.c;  // a folded row holds all channels
  if (forced.group_rows > 0) plan->group_rows = forced.group_rows;
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
  // A mask is laid out by the scheme, which backward chooses without knowing who wrote it.
  if (pass == Pass::kEval && !masked) plan = planner.single_pass(plan);
  // What is written can only stay in a cache that holds what is read beside it.
  const std::int64_t plane_bytes = problem.s * size_of(problem.dtype);
  const bool whole_lines =
      plan.scheme != Scheme::kPlanes || plane_bytes % kLine == 0 || plane_bytes >= kLongPlane;
  const std::int64_t moved = (reads + 1) * problem.numel() * size_of(problem.dtype);
  const std::int64_t held = pass == Pass::kEval ? caches.l3 : std::min(caches.l3, kSharedCache);
  plan.stream = whole_lines && moved > held;
  plan.group_rows = planner.group_rows(plan);
  apply(forced, problem, masked, &plan);
  return plan;
}

Traffic predict_traffic(const Problem& problem, Pass pass, const Operands& operands,
                        const CpuPlan& plan, const CacheSizes& caches) {
  const std::int64_t tensor = problem.numel() * size_of(problem.dtype);
  const std::int64_t bits = operands.masked ? mask_rows(problem) * mask_row_bytes(problem) : 0;
  const std::int64_t residual = operands.residual ? tensor : 0;
  const std::int64_t written = operands.outputs * tensor;
  // What is reduced; backward needs z, so what it is made of, too.
  const bool backward = pass == Pass::kBackward;
  const std::int64_t reduced = backward ? 2 * tensor + residual + bits : tensor;

  Traffic traffic{Level::kNone, (backward ? 2 : 1) * tensor + residual + written + bits, 0};
  traffic.predicted = traffic.compulsory;
  if (pass != Pass::kEval && operands.outputs > 0) {
    const std::int64_t unit = reduced / problem.c * plan.unit_channels;
    const std::int64_t of_thread = plan.cooperative ? unit / plan.threads : unit;
    traffic.second_reading = of_thread <= budget(caches.l2)                  ? Level::kL2
                             : of_thread * plan.threads <= budget(caches.l3) ? Level::kL3
                                                                             : Level::kMemory;
    if (traffic.second_reading == Level::kMemory) traffic.predicted += reduced;
  }
  if (!plan.stream && traffic.compulsory > budget(caches.l3)) traffic.predicted += written;
  return traffic;
}

}  // namespace batchnorm
