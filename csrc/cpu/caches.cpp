// Cache sizes as Linux tells them; elsewhere those of a common server.
#include <fstream>
#include <string>

#include "cpu/batchnorm.h"

namespace batchnorm {
namespace cpu {
namespace {

// sysfs names the part of a cache that this core can use; sysconf (and so cpuid) may add up those
// of a whole socket under a hypervisor. 0 where there is no such level.
std::int64_t read_size(int level) {
  const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index";
  for (int index = 0; index < 8; ++index) {
    const std::string path = folder + std::to_string(index);
    int this_level = 0;
    std::int64_t kib = 0;
    std::string type;
    if (!(std::ifstream(path + "/level") >> this_level)) break;
    std::ifstream(path + "/type") >> type;
    std::ifstream(path + "/size") >> kib;  // as in "1024K"
    if (this_level == level && type != "Instruction") return kib * 1024;
  }
  return 0;
}

CacheSizes read_sizes() {
  constexpr std::int64_t kMiB = 1 << 20;
  const std::int64_t l2 = read_size(2), l3 = read_size(3);
  return {l2 > 0 ? l2 : kMiB, l3 > 0 ? l3 : 16 * kMiB};
}

}  // namespace

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = read_sizes();
  return sizes;
}

}  // namespace cpu
}  // namespace batchnorm
