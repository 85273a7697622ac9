// How a CPU call is cut into work: the only place with thresholds. Pure integers in, plan out.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace batchnorm {

enum class Pass : std::uint8_t { kForward, kBackward, kEval };

struct CacheSizes {
  std::int64_t l2;  // bytes per core
  std::int64_t l3;  // bytes that the threads share
};

// The shape of the matrix whose columns the kernels reduce.
//   kColumns   channels-last: a row is `fold` rows of the tensor, a column one channel of one.
//   kPlanes    channels-first: no matrix, but the planes of one channel after another.
//   kExpanded  channels-first with small planes: a row is all planes of a unit for one n.
enum class Scheme : std::uint8_t { kColumns, kPlanes, kExpanded };

// A unit is a range of channels that is reduced, then written while the caches still hold it.
struct CpuPlan {
  Scheme scheme;
  bool cooperative;  // all threads share a unit, each a part of its rows; else a thread has its own
  bool stream;       // stores that go past the caches
  int threads;
  std::int64_t unit_channels;
  std::int64_t fold;
  int group_rows;  // of a matrix, that a reduction walks together
};

// What a test or a measurement may prescribe; -1 leaves a field to the planner.
struct PlanOverride {
  int scheme = -1;
  int cooperative = -1;
  int stream = -1;
  int threads = -1;
  std::int64_t unit_channels = -1;
  std::int64_t fold = -1;
  int group_rows = -1;
};

// masked: the call reads or writes the 1-bit mask, whose rows fix the scheme's (see core/types.h).
CpuPlan plan_cpu(const Problem& problem, Pass pass, bool masked, int threads,
                 const CacheSizes& caches, const PlanOverride& forced = {});

}  // namespace batchnorm
