// What this build holds, as setup.py decided.
#pragma once

namespace batchnorm {
namespace bindings {

#ifdef BATCHNORM_EXT_CUDA
constexpr bool kHasCuda = true;
constexpr const char* kCudaVersion = BATCHNORM_EXT_CUDA;  // of nvcc
constexpr const char* kCudaArchitectures = BATCHNORM_EXT_CUDA_ARCHITECTURES;
#else
constexpr bool kHasCuda = false;
constexpr const char* kCudaVersion = "";
constexpr const char* kCudaArchitectures = "";
#endif

}  // namespace bindings
}  // namespace batchnorm
