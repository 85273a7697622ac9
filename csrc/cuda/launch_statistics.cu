// Small things: statistics of channels, one thread for each.
#include <algorithm>

#include "cuda/batchnorm.h"
#include "cuda/channel_values.cuh"
#include "cuda/launch.h"

namespace batchnorm {
namespace cuda {
namespace {

struct StatisticsArguments {
  ChannelValues running_mean, running_var;
  double eps;
  std::int64_t c;
  double *mean, *invstd;  // [c]
};

// One thread for each channel.
__global__ void eval_statistics_kernel(const __grid_constant__ StatisticsArguments a) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= a.c) return;
  a.mean[c] = load_value(a.running_mean, c, 0);
  a.invstd[c] = 1 / sqrt(load_value(a.running_var, c, 1) + a.eps);
}

// Counting is the last thing that the one block, or any of several, does: where the counter is
// read, there is one block (below).
__global__ void combine_moments_kernel(const __grid_constant__ CombineMoments a) {
  const double momentum = momentum_of(a.running, true);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t c = first; c < a.c; c += threads) {
    const batchnorm::Moments all = a.of_channel(c);
    a.mean[c] = all.mean;
    a.var[c] = all.variance();
    a.invstd[c] = 1 / sqrt(a.var[c] + a.eps);
    move(a.running, c, all, momentum);
  }
  __syncthreads();
  if (first != 0) return;
  *a.count = a.count_of_all();
  if (a.running.num_batches_tracked) ++*a.running.num_batches_tracked;
}

// Threads of blocks that share nothing.
template <typename Arguments>
cudaError_t launch_blocks(void (*kernel)(Arguments), std::int64_t blocks, cudaStream_t stream,
                          const Arguments& arguments) {
  CudaPlan plan = {};
  plan.strategy = Strategy::kSinglePass;
  plan.team = 1;
  plan.units_at_once = blocks;
  return launch(kernel, plan, stream, arguments);
}

std::int64_t blocks_for(std::int64_t channels) {
  return (channels + kCudaThreads - 1) / kCudaThreads;
}

}  // namespace

cudaError_t combine_moments(const CombineMoments& call, cudaStream_t stream) {
  const bool reads_counter = call.running.cumulative_average && call.running.num_batches_tracked;
  const std::int64_t blocks = reads_counter ? 1 : std::max<std::int64_t>(blocks_for(call.c), 1);
  return launch_blocks(combine_moments_kernel, blocks, stream, call);
}

cudaError_t eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                            double eps, std::int64_t c, double* mean, double* invstd,
                            cudaStream_t stream) {
  if (c == 0) return cudaSuccess;
  return launch_blocks(eval_statistics_kernel, blocks_for(c), stream,
                       StatisticsArguments{running_mean, running_var, eps, c, mean, invstd});
}

}  // namespace cuda
}  // namespace batchnorm
