// Chooses the instruction set at run time.
#include <atomic>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd/tables.h"

namespace batchnorm {
namespace cpu {
namespace {

Capability best() {
  for (int i = kCapabilities - 1; i > 0; --i) {
    if (is_available(static_cast<Capability>(i))) return static_cast<Capability>(i);
  }
  return Capability::kPortable;
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> value{best()};
  return value;
}

}  // namespace

bool is_built(Capability capability) {
#if defined(BATCHNORM_X86_KERNELS)
  (void)capability;
  return true;
#else
  return capability == Capability::kPortable;
#endif
}

bool is_available(Capability capability) {
  if (capability == Capability::kPortable) return true;
#if defined(BATCHNORM_X86_KERNELS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (capability == Capability::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (capability == Capability::kAvx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Capability capability() { return current().load(std::memory_order_relaxed); }

bool set_capability(Capability capability) {
  if (!is_available(capability)) return false;
  current().store(capability, std::memory_order_relaxed);
  return true;
}

template <typename T>
const Kernels<T>& kernels() {
#if defined(BATCHNORM_X86_KERNELS)
  switch (capability()) {
    case Capability::kAvx512Bf16:
      if constexpr (std::is_same_v<T, BFloat16>) return avx512_bf16::table<T>();
      [[fallthrough]];
    case Capability::kAvx512:
      return avx512::table<T>();
    case Capability::kAvx2:
      return avx2::table<T>();
    default:
      break;
  }
#endif
  return portable::table<T>();
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();

}  // namespace cpu
}  // namespace batchnorm
