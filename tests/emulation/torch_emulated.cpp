// The operators on CPU tensors by the CUDA kernels: the bindings, the plan, the launchers and the
// kernels are those of a CUDA build, the device is the emulated one. Importing this module puts it
// in the place of the CPU's backend.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cstring>

#include "bindings/cuda_plans.h"
#include "bindings/module.h"
#include "bindings/operators.h"
#include "bindings/run_cuda.h"
#include "emulation.h"

namespace batchnorm {
namespace bindings {
namespace {

// Memory of no content is full of NaN here, so that what a kernel leaves out is seen.
at::Tensor filled(const at::TensorBase& memory) {
  if (memory.nbytes() > 0) std::memset(memory.mutable_data_ptr(), 0xff, memory.nbytes());
  return at::Tensor(memory);
}

void check(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

struct EmulatedBackend {
  explicit EmulatedBackend(const at::Tensor&) {}

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return filled(at::detail::empty_cpu(sizes, dtype));
  }
  at::Tensor empty_output(const at::Tensor& like) const {
    return filled(at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
  }
  bool may_wait() const { return true; }
  template <typename Call>
  void run(const Call& call) const {
    DeviceLimits limits;
    check(cuda::device_limits(0, &limits));
    check(run_cuda(*this, limits, nullptr, call));
  }
  void eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                       double eps, std::int64_t c, double* mean, double* invstd) const {
    check(cuda::eval_statistics(running_mean, running_var, eps, c, mean, invstd, nullptr));
  }
};

void set_device(const std::string& name) {
  constexpr const char* kNames[] = {"hopper", "ampere", "turing"};
  const emulation::Device devices[] = {
      {}, emulation::Device::ampere(), emulation::Device::turing()};
  emulation::set_device(devices[index_of(name, kNames, "the emulated device")]);
}

}  // namespace
}  // namespace bindings
}  // namespace batchnorm

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  // torch warns of a kernel that takes another's place; here that is the purpose.
  struct Silent : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  } handler;
  const c10::WarningUtils::WarningHandlerGuard guard(&handler);
  batchnorm::bindings::register_operators<batchnorm::bindings::EmulatedBackend>(m);
}

PYBIND11_MODULE(torch_emulated, m) {
  using namespace batchnorm::bindings;
  m.def("set_device", &set_device, pybind11::arg("name"),
        "hopper (also without this call), ampere or turing, for all calls that follow.");
  m.def(
      "launches", [] { return emulation::counts().launches; },
      "How many kernels have been launched.");
  define_cuda_plans(m);
}
