// Stands for the kernels of an instruction set, KERNELS_FOR, in a program that does without them.
#include <cstdlib>

#include "cpu/simd/tables.h"

namespace batchnorm {
namespace cpu {
namespace KERNELS_FOR {

template <typename T>
const Kernels<T>& table() {
  std::abort();
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();
template const Kernels<BFloat16>& table<BFloat16>();
template const Kernels<Half>& table<Half>();

}  // namespace KERNELS_FOR
}  // namespace cpu
}  // namespace batchnorm
