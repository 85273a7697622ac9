// The operators on CPU tensors by the CUDA kernels: the bindings, the plan, the launchers and the
// kernels are those of a CUDA build, the device is the emulated one. Importing this module puts it
// in the place of the CPU's backend.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cstring>
#include <memory>

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

std::unique_ptr<cuda::Device>& opened() {
  static std::unique_ptr<cuda::Device> device;
  return device;
}
cuda::Device& device() {
  if (!opened()) {
    opened() = std::make_unique<cuda::Device>();
    check(opened()->open(0));
  }
  return *opened();
}

struct EmulatedBackend {
  static constexpr bool kHostMemory = false;  // as on a device

  explicit EmulatedBackend(const at::Tensor&) {}

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return filled(at::detail::empty_cpu(sizes, dtype));
  }
  at::Tensor empty_output(const at::Tensor& like) const {
    return filled(at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
  }
  at::Tensor empty_passing(const at::Tensor& like) const { return empty_output(like); }
  bool may_wait() const { return true; }
  template <typename Call>
  void run(const Call& call) const {
    check(run_cuda(*this, device(), nullptr, call));
  }
  void eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                       double eps, std::int64_t c, double* mean, double* invstd) const {
    check(cuda::eval_statistics(running_mean, running_var, eps, c, mean, invstd, nullptr));
  }
};

void set_device(const std::string& name, int code, int registers, int held, bool odd_clusters) {
  constexpr const char* kNames[] = {"hopper", "ampere", "turing"};
  emulation::Device devices[] = {{}, emulation::Device::ampere(), emulation::Device::turing()};
  emulation::Device& chosen = devices[index_of(name, kNames, "the emulated device")];
  chosen.code_architecture = code;
  chosen.registers_per_thread = registers;
  chosen.held_multiprocessors = held;
  chosen.odd_clusters = odd_clusters;
  emulation::set_device(chosen);
  opened().reset();
}

py::dict counts() {
  const emulation::Counts counts = emulation::counts();
  return py::dict(py::arg("launches") = counts.launches, py::arg("refusals") = counts.refusals,
                  py::arg("questions") = counts.questions);
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
  m.def("set_device", &set_device, py::arg("name"), py::kw_only(), py::arg("code") = 0,
        py::arg("registers") = 32, py::arg("held") = 0, py::arg("odd_clusters") = true,
        "hopper (also without this call), ampere or turing, for all calls that follow: by code for "
        "an older device, of kernels with so many registers, with so many multiprocessors held, "
        "with clusters of powers of two alone.");
  m.def("counts", &counts, "Kernels launched, launches refused, and what the driver was asked.");
  m.def("max_cluster", [] { return device().limits().max_cluster; }, "Of the device as it is.");
  define_cuda_plans(m);
}
