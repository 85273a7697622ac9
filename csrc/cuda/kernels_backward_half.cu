#include "cuda/backward_kernels.cuh"

namespace batchnorm {
namespace cuda {

template BackwardKernel backward_kernel_for<Half>(Mapping, Access, bool);

}  // namespace cuda
}  // namespace batchnorm
