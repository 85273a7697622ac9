#include "cuda/forward_kernels.cuh"

namespace batchnorm {
namespace cuda {

template ForwardKernel forward_kernel_for<BFloat16>(Mapping, Access, bool);

}  // namespace cuda
}  // namespace batchnorm
