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

// What a call reads and writes beside x, and in backward dy.
struct Operands {
  bool residual;
  bool masked;
  int outputs;  // 0: backward for the gradients of weight and bias alone
};

// Where a unit's data are when they are read for the second time.
enum class Level : std::uint8_t { kNone, kL2, kL3, kMemory };

// What a plan should cost where no cache holds any of the tensors before: for people, nothing is
// decided by it.
struct Traffic {
  Level second_reading;     // kNone: there is none
  std::int64_t compulsory;  // bytes that cross memory if everything does once
  std::int64_t predicted;   // ... with what is read again, and lines that are read to be written
};

Traffic predict_traffic(const Problem& problem, Pass pass, const Operands& operands,
                        const CpuPlan& plan, const CacheSizes& caches);

}  // namespace batchnorm
