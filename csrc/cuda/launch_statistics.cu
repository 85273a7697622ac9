// Small things of the host side: the running statistics as backward needs them, and the device.
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

}  // namespace

cudaError_t eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                            double eps, std::int64_t c, double* mean, double* invstd,
                            cudaStream_t stream) {
  if (c == 0) return cudaSuccess;
  CudaPlan plan = {};
  plan.strategy = Strategy::kSinglePass;
  plan.team = 1;
  plan.units_at_once = (c + kCudaThreads - 1) / kCudaThreads;
  return launch(eval_statistics_kernel, plan, stream,
                StatisticsArguments{running_mean, running_var, eps, c, mean, invstd});
}

cudaError_t device_limits(int device, DeviceLimits* limits) {
  cudaError_t error = cudaSuccess;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  // 8 is the largest cluster that every device with clusters takes.
  constexpr int kPortableCluster = 8;
  limits->compute_capability =
      10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  limits->multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  limits->threads_per_multiprocessor = ask(cudaDevAttrMaxThreadsPerMultiProcessor);
  limits->shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits->shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits->reserved_shared = ask(cudaDevAttrReservedSharedMemoryPerBlock);
  limits->l2 = ask(cudaDevAttrL2CacheSize);
  limits->max_cluster = ask(cudaDevAttrClusterLaunch) != 0 ? kPortableCluster : 1;
  limits->cooperative = ask(cudaDevAttrCooperativeLaunch) != 0;
  return error;
}

}  // namespace cuda
}  // namespace batchnorm
