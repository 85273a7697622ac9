// A device that refuses every call, for the tests of what the checks report. In the cases of
// float64 it is lost, in those of float16 the whole process is.
#include <cstdlib>

#include "kernels/cases.h"
#include "kernels/device.h"

namespace check {

Memory::Memory(std::size_t bytes)
    : bytes_(bytes), host_(static_cast<unsigned char*>(std::malloc(bytes))), device_(host_) {}
Memory::~Memory() { std::free(host_); }

namespace {
DType dtype_of_case;
}

cudaError_t call(const std::function<cudaError_t()>&) {
  if (dtype_of_case == DType::kDouble) throw DeviceLost("a kernel: it is lost");
  if (dtype_of_case == DType::kHalf) std::abort();
  return cudaErrorInvalidValue;
}

std::string set_up(Case* c) {
  dtype_of_case = c->problem.dtype;
  return static_cast<Strategy>(c->forced.strategy) == Strategy::kCluster ? "no clusters" : "";
}

void set_order(std::uint64_t) {}
void send(const Memory&) {}
Driver driver() { return {0, 0}; }
cuda::Device& opened() {
  static cuda::Device never;
  return never;
}

}  // namespace check
