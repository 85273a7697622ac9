#include "cuda/backward_kernels.cuh"

namespace batchnorm {
namespace cuda {

template BackwardKernel backward_kernel_for<BFloat16>(Mapping, Access, bool);

}  // namespace cuda
}  // namespace batchnorm
