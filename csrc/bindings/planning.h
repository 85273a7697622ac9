// Plans for the machine at hand, with what tests prescribe.
#pragma once

#include "core/plan.h"
#include "core/plan_cuda.h"

namespace batchnorm {
namespace bindings {

CpuPlan plan_here(const Problem& problem, Pass pass, bool masked);
PlanOverride& plan_override();

inline CudaPlanOverride& cuda_plan_override() {
  static CudaPlanOverride forced;
  return forced;
}

}  // namespace bindings
}  // namespace batchnorm
