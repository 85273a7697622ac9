// Stands for the kernels of dtypes that a program does without: EACH_LEFT_OUT(DO) is DO(type) of
// each.
#include <cstdlib>

#include "cuda/backward_kernels.cuh"
#include "cuda/forward_kernels.cuh"

#define NO_KERNELS_OF(T)                                         \
  template <>                                                    \
  ForwardKernel forward_kernel_for<T>(Mapping, Access, bool) {   \
    std::abort();                                                \
  }                                                              \
  template <>                                                    \
  BackwardKernel backward_kernel_for<T>(Mapping, Access, bool) { \
    std::abort();                                                \
  }

namespace batchnorm {
namespace cuda {

EACH_LEFT_OUT(NO_KERNELS_OF)

}  // namespace cuda
}  // namespace batchnorm
