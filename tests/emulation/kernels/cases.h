// Which cases are checked.
#pragma once

#include <cstdio>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "core/activation.h"
#include "core/plan_cuda.h"
#include "values.h"

namespace check {

struct Case {
  Problem problem;
  Activation activation;
  bool residual;
  int shift;            // elements off an aligned address
  double mean;          // of the data, in standard deviations
  bool cumulative;      // momentum=None
  bool bare;            // no weight, no bias, no running statistics in training
  DType parameters;     // of the per-channel values
  std::int64_t stride;  // of the per-channel values
  CudaPlanOverride forced;
  std::string device;  // the emulated one

  bool masked() const { return residual && is_piecewise_linear(activation); }
  std::int64_t channel_of(std::int64_t i) const {
    const Problem& p = problem;
    return p.layout == Layout::kChannelsFirst ? i / p.s % p.c : i % p.c;
  }
  // The bit of the mask that element i has (core/types.h).
  std::int64_t mask_bit(std::int64_t i) const {
    if (expanded_channels(problem) > 0) return i;
    const std::int64_t row = problem.layout == Layout::kChannelsFirst ? problem.s : problem.c;
    return i / row * mask_row_bytes(problem) * 8 + i % row;
  }

  std::string name() const {
    char text[320];
    std::snprintf(text, sizeof(text),
                  "%s %s n=%lld c=%lld s=%lld %s%s%s%s shift=%d mean=%g %s stride=%lld strategy=%d "
                  "team=%d slots=%d units_at_once=%lld access=%d width=%lld %s",
                  problem.layout == Layout::kChannelsFirst ? "first" : "last",
                  kDTypeNames[static_cast<int>(problem.dtype)], static_cast<long long>(problem.n),
                  static_cast<long long>(problem.c), static_cast<long long>(problem.s),
                  kActivationNames[static_cast<int>(activation)], residual ? "+residual" : "",
                  cumulative ? " cumulative" : "", bare ? " bare" : "", shift, mean,
                  kDTypeNames[static_cast<int>(parameters)], static_cast<long long>(stride),
                  forced.strategy, forced.team, forced.slots,
                  static_cast<long long>(forced.units_at_once), forced.access,
                  static_cast<long long>(forced.unit_channels), device.c_str());
    return text;
  }
};

struct Size {
  std::int64_t n, c, s;
};

// Tails and odd sizes, one value or row for each column, more cells than threads, several units.
inline const std::vector<Size>& sizes_of(Layout layout) {
  static const std::vector<Size> first = {{2, 3, 16},   {3, 4, 49}, {5, 2, 520}, {17, 8, 4},
                                          {1, 3, 2055}, {33, 5, 8}, {9, 16, 2},  {1, 8, 4},
                                          {70, 3, 72},  {2, 7, 1},  {40, 24, 9}};
  static const std::vector<Size> last = {{7, 8, 1},    {40, 3, 1}, {5, 24, 9},  {3, 65, 5},
                                         {300, 16, 1}, {2, 72, 3}, {11, 17, 2}, {1, 40, 2},
                                         {1, 9, 1},    {2, 3, 1},  {530, 8, 2}};
  return layout == Layout::kChannelsFirst ? first : last;
}

// Channels of a unit whose partial results a team of 6 blocks shares out.
constexpr std::int64_t kWide = 136;
// Blocks of a team whose partial results a warp gathers, and channels of which it has several.
constexpr int kLarge = 9;
constexpr std::int64_t kSeveral = 24;

// What a plan leaves to chance is forced: each strategy with few and many slots, teams and waves.
inline std::vector<CudaPlanOverride> plans() {
  const int block = static_cast<int>(Strategy::kBlock),
            cluster = static_cast<int>(Strategy::kCluster),
            grid = static_cast<int>(Strategy::kGrid), two = static_cast<int>(Strategy::kTwoKernels);
  const int scalar = static_cast<int>(Access::kScalar);
  return {{},
          {block, -1, -1, 0, -1, -1},
          {block, scalar, -1, 1, 8, 2},
          {cluster, -1, 2, -1, -1, -1},
          {cluster, -1, 4, 1, 16, 1},
          {grid, -1, 3, -1, -1, 2},
          {grid, scalar, 12, 0, 8, 1},
          {grid, -1, 6, -1, kWide, 1},
          {two, -1, 2, -1, -1, -1},
          {two, -1, kLarge, -1, kSeveral, 2}};
}

// Far from 0 in float32 and float64; the 16-bit dtypes have no digits for it.
inline double large_mean(DType dtype) {
  return dtype == DType::kFloat ? 1e6 : dtype == DType::kDouble ? 1e9 : 100;
}

// Hopper as it is, with code that knows no clusters, with kernels of which one block fits, and with
// a neighbour who holds a part of it. They are 7, so that each meets each of 10 plans.
constexpr const char* kHoppers[] = {"hopper",    "hopper", "old code", "hopper",
                                    "one block", "hopper", "shared"};

// Every dtype x layout x activation x plan; what needs no full cross product is drawn.
inline std::vector<Case> all_cases() {
  std::vector<Case> cases;
  std::mt19937 random(1);
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  for (const DType dtype : {DType::kFloat, DType::kBFloat16, DType::kHalf, DType::kDouble}) {
    for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      for (int a = 0; a < kActivations; ++a) {
        for (const CudaPlanOverride& forced : plans()) {
          const std::vector<Size>& sizes = sizes_of(layout);
          Size size = sizes[random() % sizes.size()];
          // Rows for each of 6 blocks. So many channels take the emulation a second.
          const bool is_wide = forced.unit_channels == kWide && layout == Layout::kChannelsLast;
          if (is_wide && a % 4 == 0) size = {33, kWide + size.c % 3, 3};
          const bool is_large = forced.team == kLarge && layout == Layout::kChannelsLast;
          if (is_large && a % 4 == 0) size = {86 * kLarge, kSeveral + 1, 1};
          Case c = {};
          c.problem = {layout, dtype, size.n, size.c, size.s};
          c.activation = static_cast<Activation>(a);
          c.residual = one_in(2);
          c.shift = one_in(5) ? 1 : 0;
          c.cumulative = one_in(5);
          c.bare = one_in(8);
          c.parameters = static_cast<DType>(random() % 4);
          // float16 has no room for a large running mean.
          const bool is_far = one_in(5);
          if (is_far && c.parameters != DType::kHalf) c.mean = large_mean(dtype);
          c.stride = one_in(4) ? 2 : 1;
          c.forced = forced;
          c.device = one_in(12) ? "turing" : one_in(12) ? "ampere" : "hopper";
          if (c.device == "hopper") c.device = kHoppers[cases.size() % std::size(kHoppers)];
          cases.push_back(c);
        }
      }
    }
  }
  return cases;
}

}  // namespace check
