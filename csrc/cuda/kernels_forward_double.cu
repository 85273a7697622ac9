#include "cuda/forward_kernels.cuh"

namespace batchnorm {
namespace cuda {

template ForwardKernel forward_kernel_for<double>(Mapping, Access, bool);

}  // namespace cuda
}  // namespace batchnorm
