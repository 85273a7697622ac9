// Linked into a program, it has the emulated device begin as one without clusters.
#include "emulation.h"

namespace {

[[maybe_unused]] const bool is_set = [] {
  emulation::set_device(emulation::Device::turing());
  return true;
}();

}  // namespace
