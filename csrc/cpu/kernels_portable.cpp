// The kernels for any processor: 16-byte vectors of the compiler's own kind (SSE2, NEON, ...).
#include "cpu/simd/tables.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define BATCHNORM_NATIVE_BYTES 16
#define BATCHNORM_HAS_BF16 0

namespace batchnorm {
namespace cpu {
namespace portable {
#include "cpu/simd/kernels.inc.h"
}  // namespace portable
}  // namespace cpu
}  // namespace batchnorm
