// A real device, for the checks: memory of its own, and limits that cannot be chosen.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "kernels/cases.h"
#include "kernels/device.h"

namespace check {
namespace {

// All that there is now. A few dozen small pieces, so copying all of them at each call is cheap.
std::set<const Memory*>& all_memory() {
  static std::set<const Memory*> all;
  return all;
}

// What fails here was not asked of a kernel: an earlier kernel has broken the device, or there is
// none.
void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw DeviceLost(std::string(what) + ": " + cudaGetErrorString(error));
}

// The host's copy is no use while kernels run: where one is given its address, even a device that
// can read it shows the mistake.
void to_device(const Memory& memory) {
  require(cudaMemcpy(memory.device(), memory.host(), memory.bytes(), cudaMemcpyHostToDevice),
          "cudaMemcpy to the device");
  std::memset(memory.host(), 0x5a, memory.bytes());
}
void to_host(const Memory& memory) {
  require(cudaMemcpy(memory.host(), memory.device(), memory.bytes(), cudaMemcpyDeviceToHost),
          "cudaMemcpy from the device");
}

}  // namespace

Memory::Memory(std::size_t bytes)
    : bytes_(bytes), host_(static_cast<unsigned char*>(std::malloc(bytes > 0 ? bytes : 1))) {
  void* device = nullptr;
  require(cudaMalloc(&device, bytes > 0 ? bytes : 1), "cudaMalloc");
  device_ = static_cast<unsigned char*>(device);
  all_memory().insert(this);
}
Memory::~Memory() {
  all_memory().erase(this);
  cudaFree(device_);
  std::free(host_);
}

cudaError_t call(const std::function<cudaError_t()>& launcher) {
  for (const Memory* memory : all_memory()) to_device(*memory);
  const cudaError_t refused = launcher();
  cudaGetLastError();  // what was refused is reported once, by its launcher
  const cudaError_t broken = cudaDeviceSynchronize();
  if (broken != cudaSuccess) require(broken, "a kernel");
  for (const Memory* memory : all_memory()) to_host(*memory);
  return refused;
}

void send(const Memory& memory) { to_device(memory); }

cuda::Device& opened() {
  static cuda::Device device;
  static const bool is_open = [] {
    require(device.open(0), "the device");
    return true;
  }();
  (void)is_open;
  return device;
}

Driver driver() { return {0, 0}; }

std::string set_up(Case* c) {
  const DeviceLimits& limits = opened().limits();
  c->device = "sm_" + std::to_string(limits.compute_capability);
  const auto strategy = static_cast<Strategy>(c->forced.strategy);
  if (strategy == Strategy::kCluster && c->forced.team > limits.max_cluster)
    return "the device has no clusters";
  if (strategy == Strategy::kGrid && !limits.cooperative)
    return "the device has no cooperative launches";
  return "";
}

void set_order(std::uint64_t) {}  // the hardware's

}  // namespace check
