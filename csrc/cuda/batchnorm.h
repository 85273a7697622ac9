// Batch normalization on CUDA devices: what the bindings call, by run() of run.h. Device pointers
// in, an error out; no torch. Nothing here allocates, synchronises or throws.
#pragma once

#include <cuda_runtime_api.h>

#include "core/calls.h"
#include "cuda/occupancy.h"

namespace batchnorm {
namespace cuda {

// plan: for the occupancy of kernel_of(call, ...), asked before. workspace: plan.workspace_bytes of
// device memory, aligned to 16 bytes, of no content, that no other call uses before this one has
// run on the stream. The current device must be the stream's.
cudaError_t enqueue(const ForwardTrain& call, const CudaPlan& plan, void* workspace,
                    cudaStream_t stream);
cudaError_t enqueue(const ForwardEval& call, const CudaPlan& plan, void* workspace,
                    cudaStream_t stream);
cudaError_t enqueue(const Backward& call, const CudaPlan& plan, void* workspace,
                    cudaStream_t stream);
// mean = running_mean, invstd = 1 / sqrt(running_var + eps), [c].
cudaError_t eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                            double eps, std::int64_t c, double* mean, double* invstd,
                            cudaStream_t stream);

cudaError_t combine_moments(const CombineMoments& call, cudaStream_t stream);

// What plan_cuda needs to know of the call. `aligned` is read off the pointers.
CudaRequest request_of(const ForwardTrain& call);
CudaRequest request_of(const ForwardEval& call);
CudaRequest request_of(const Backward& call);

Kernel kernel_of(const ForwardTrain& call, const Traversal& traversal);
Kernel kernel_of(const ForwardEval& call, const Traversal& traversal);
Kernel kernel_of(const Backward& call, const Traversal& traversal);

}  // namespace cuda
}  // namespace batchnorm
