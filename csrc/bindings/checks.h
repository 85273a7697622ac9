// What every operator requires of its arguments, in torch's words where torch has them.
//
// Called before anything is allocated or written, so that a refused call leaves no trace.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>

#include "core/activation.h"
#include "core/types.h"

namespace batchnorm {
namespace bindings {

using OptionalTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '",
                                  tensor.scalar_type(), "': ", name,
                                  " should be float32, float64, bfloat16 or float16");
  }
}

inline Activation activation_of(const std::string& name) {
  Activation activation = Activation::kIdentity;
  if (find_activation(name.c_str(), &activation)) return activation;
  std::string known;
  for (const char* each : kActivationNames) known += std::string(known.empty() ? "" : ", ") + each;
  TORCH_CHECK_VALUE(false, "activation should be one of ", known, ", but got '", name, "'");
}

inline void check_rank(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "expected at least 2D input (got ", input.dim(),
                    "D input): (N, C) or (N, C, *)");
}

inline void check_eps(double eps, bool training) {
  if (training) {
    TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  }
  TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);
  TORCH_CHECK_VALUE(std::isfinite(eps), "batch_norm eps must be finite, but got ", eps);
}

inline void check_device(const at::Tensor& tensor, const at::Tensor& input, const char* name) {
  TORCH_CHECK(tensor.device() == input.device(), "Expected all tensors to be on the same device, ",
              "but ", name, " is on ", tensor.device(), " and input is on ", input.device());
}

// Per-channel values: c elements of a floating dtype, of any shape or stride.
inline void check_channels(const OptionalTensor& values, const at::Tensor& input,
                           const char* name) {
  if (!values.has_value() || !values->defined()) return;
  check_device(*values, input, name);
  TORCH_CHECK(values->numel() == input.size(1), name, " should contain ", input.size(1),
              " elements not ", values->numel());
  dtype_of(*values, name);
}

inline void check_like_input(const at::Tensor& tensor, const at::Tensor& input, const char* name) {
  check_device(tensor, input, name);
  TORCH_CHECK(tensor.sizes() == input.sizes(), name, " should have the shape of input, ",
              input.sizes(), ", but got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name,
              " should have the dtype of input, ", input.scalar_type(), ", but got ",
              tensor.scalar_type());
}

inline void check_residual(const OptionalTensor& residual, const at::Tensor& input) {
  if (residual.has_value() && residual->defined()) check_like_input(*residual, input, "residual");
}

inline void check_both_or_neither(bool has_mean, bool has_var) {
  TORCH_CHECK_VALUE(has_mean == has_var,
                    "running_mean and running_var must either both be None or neither be None");
}

inline void check_counter(const OptionalTensor& counter, const at::Tensor& input) {
  if (!counter.has_value() || !counter->defined()) return;
  check_device(*counter, input, "num_batches_tracked");
  TORCH_CHECK(counter->numel() == 1 && counter->scalar_type() == at::kLong,
              "num_batches_tracked should be one int64 value, but got ", counter->numel(),
              " of dtype ", counter->scalar_type());
}

// Buffers are written through their pointers, so they may not overlap themselves.
inline void check_writable(const OptionalTensor& values, const char* name) {
  if (!values.has_value() || !values->defined() || values->numel() < 2) return;
  TORCH_CHECK(values->dim() == 1 && values->stride(0) != 0, name,
              " is written to, so it should be one-dimensional without overlap, but got shape ",
              values->sizes(), " and strides ", values->strides());
}

}  // namespace bindings
}  // namespace batchnorm
