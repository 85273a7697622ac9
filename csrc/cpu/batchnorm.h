// Batch normalization on the CPU: what the bindings call. Raw pointers in and out; no torch.
#pragma once

#include <cstdint>
#include <functional>

#include "core/calls.h"
#include "core/plan.h"

namespace batchnorm {
namespace cpu {

// Runs body(0) ... body(tasks - 1), in any order, on the caller's threads.
using ParallelFor =
    std::function<void(std::int64_t tasks, const std::function<void(std::int64_t)>& body)>;

void forward_train(const ForwardTrain&, const CpuPlan&, const ParallelFor&);
void forward_eval(const ForwardEval&, const CpuPlan&, const ParallelFor&);
// mean = running_mean, invstd = 1 / sqrt(running_var + eps), [c].
void eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                     double eps, std::int64_t c, double* mean, double* invstd);
void combine_moments(const CombineMoments&);
void backward(const Backward&, const CpuPlan&, const ParallelFor&);

// Of this machine, read once.
const CacheSizes& cache_sizes();

}  // namespace cpu
}  // namespace batchnorm
