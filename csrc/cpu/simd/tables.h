// Where each instruction set's kernels are found.
#pragma once

#include "cpu/kernels.h"

// Elsewhere, and where BATCHNORM_EXT_PORTABLE is defined, there are the portable kernels alone.
#if defined(__x86_64__) && !defined(BATCHNORM_EXT_PORTABLE)
#define BATCHNORM_X86_KERNELS
#endif

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
