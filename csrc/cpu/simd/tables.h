// Where each instruction set's kernels are found.
#pragma once

#include "cpu/kernels.h"

namespace batchnorm {
namespace cpu {
namespace avx512_bf16 {  // BFloat16 only
template <typename T>
const Kernels<T>& table();
}
namespace avx512 {
template <typename T>
const Kernels<T>& table();
}
namespace avx2 {
template <typename T>
const Kernels<T>& table();
}
namespace portable {
template <typename T>
const Kernels<T>& table();
}
}  // namespace cpu
}  // namespace batchnorm
