// The operators on CUDA tensors: allocation by torch's caching allocator, the call on its stream.
// Compiled in builds with CUDA only. Nothing here waits for the device.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <mutex>

#include "bindings/operators.h"
#include "bindings/run_cuda.h"

namespace batchnorm {
namespace bindings {
namespace {

// One for each, for all calls.
cuda::Device& device_of(c10::DeviceIndex index) {
  static std::array<std::once_flag, C10_COMPILE_TIME_MAX_GPUS> opened;
  static std::array<cuda::Device, C10_COMPILE_TIME_MAX_GPUS> devices;
  const auto at = static_cast<std::size_t>(index);
  std::call_once(opened.at(at), [&] { C10_CUDA_CHECK(devices[at].open(index)); });
  return devices[at];
}

class CudaBackend {
 public:
  static constexpr bool kHostMemory = false;

  explicit CudaBackend(const at::Tensor& input)
      : device_(input.device()),
        guard_(device_),
        stream_(c10::cuda::getCurrentCUDAStream(device_.index())) {}

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::Tensor(at::detail::empty_cuda(sizes, dtype, device_, std::nullopt));
  }
  at::Tensor empty_output(const at::Tensor& like) const {
    return at::Tensor(
        at::detail::empty_strided_cuda(like.sizes(), like.strides(), like.scalar_type(), device_));
  }
  at::Tensor empty_passing(const at::Tensor& like) const { return empty_output(like); }
  // A stream that is captured into a graph runs nothing.
  bool may_wait() const {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
  }
  template <typename Call>
  void run(const Call& call) const {
    C10_CUDA_CHECK(run_cuda(*this, device_of(device_.index()), stream_, call));
  }
  void eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                       double eps, std::int64_t c, double* mean, double* invstd) const {
    C10_CUDA_CHECK(cuda::eval_statistics(running_mean, running_var, eps, c, mean, invstd, stream_));
  }

 private:
  c10::Device device_;
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

}  // namespace
}  // namespace bindings
}  // namespace batchnorm

TORCH_LIBRARY_IMPL(batchnorm_ext, CUDA, m) {
  batchnorm::bindings::register_operators<batchnorm::bindings::CudaBackend>(m);
}
