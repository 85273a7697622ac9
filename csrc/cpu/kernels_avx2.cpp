// The kernels for AVX2; used where the processor has it (cpu/capability.cpp).
#include "cpu/simd/tables.h"

#if defined(BATCHNORM_X86_KERNELS)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define BATCHNORM_NATIVE_BYTES 32
#define BATCHNORM_HAS_BF16 0

namespace batchnorm {
namespace cpu {
namespace avx2 {
#include "cpu/simd/kernels.inc.h"
}  // namespace avx2
}  // namespace cpu
}  // namespace batchnorm

#pragma GCC pop_options
#endif
