// Chooses the instruction set at run time.
#include <atomic>

#include "cpu/kernels.h"
#include "cpu/simd/tables.h"

namespace batchnorm {
namespace cpu {
namespace {

Capability best() {
  if (is_available(Capability::kAvx512)) return Capability::kAvx512;
  if (is_available(Capability::kAvx2)) return Capability::kAvx2;
  return Capability::kPortable;
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> value{best()};
  return value;
}

}  // namespace

bool is_built(Capability capability) {
#if defined(__x86_64__)
  (void)capability;
  return true;
#else
  return capability == Capability::kPortable;
#endif
}

bool is_available(Capability capability) {
  if (capability == Capability::kPortable) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (capability == Capability::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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
#if defined(__x86_64__)
  switch (capability()) {
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
