// The emulated device, for the checks: it shares the host's memory, and is what a case names.
#include <cstdlib>
#include <memory>

#include "emulation.h"
#include "kernels/cases.h"
#include "kernels/device.h"

namespace check {
namespace {

emulation::Device device_named(const std::string& name) {
  emulation::Device device = name == "turing"   ? emulation::Device::turing()
                             : name == "ampere" ? emulation::Device::ampere()
                                                : emulation::Device{};
  device.multiprocessors = 3;                       // a grid of all of it is still small
  if (name == "ampere") device.l2_bytes = 1 << 10;  // too small for what is written
  if (name == "old code") device.code_architecture = 80;
  if (name == "one block") device.registers_per_thread = 192;
  if (name == "shared") device.registers_per_thread = 128, device.held_multiprocessors = 1;
  return device;
}

std::unique_ptr<cuda::Device>& current() {
  static std::unique_ptr<cuda::Device> device;
  return device;
}

}  // namespace

// As large as it was asked for: AddressSanitizer sees the bytes around it.
Memory::Memory(std::size_t bytes)
    : bytes_(bytes),
      host_(static_cast<unsigned char*>(std::malloc(bytes > 0 ? bytes : 1))),
      device_(host_) {}
Memory::~Memory() { std::free(host_); }

cudaError_t call(const std::function<cudaError_t()>& launcher) { return launcher(); }

// A plan that a device cannot follow is a case, too: the planner takes another one.
std::string set_up(Case* c) {
  emulation::set_device(device_named(c->device));
  current() = std::make_unique<cuda::Device>();
  if (current()->open(0) != cudaSuccess) std::abort();
  return "";
}

cuda::Device& opened() { return *current(); }
void send(const Memory&) {}
Driver driver() { return {emulation::counts().refusals, emulation::counts().questions}; }

void set_order(std::uint64_t seed) { emulation::set_seed(seed); }

}  // namespace check
