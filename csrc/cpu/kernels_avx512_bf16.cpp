// The bfloat16 kernels for AVX512 with BF16 instructions; used where the processor has it
// (cpu/capability.cpp).
#include "cpu/simd/tables.h"

#if defined(BATCHNORM_X86_KERNELS)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target( \
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define BATCHNORM_NATIVE_BYTES 64
#define BATCHNORM_HAS_BF16 1

namespace batchnorm {
namespace cpu {
namespace avx512_bf16 {
#include "cpu/simd/kernels.inc.h"
}  // namespace avx512_bf16
}  // namespace cpu
}  // namespace batchnorm

#pragma GCC pop_options
#endif
