// What a backend is asked to do: raw pointers into the backend's memory, no torch.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/types.h"

namespace batchnorm {

// x, residual, y, dy, dx, dresidual: problem.numel() elements of problem.dtype in problem.layout.
// mean, invstd: double [c]. mask: mask_rows() x mask_row_bytes() of core/types.h.

// Statistics of the batch, y = act((x - mean) * invstd * weight + bias + residual), and
// running = (1 - momentum) * running + momentum * batch (the variance unbiased, n / (n - 1), and
// left as it is by a batch of one value, which has no such variance).
struct ForwardTrain {
  Problem problem;
  const void* x;
  const void* residual;  // or null
  void* y;
  std::uint8_t* mask;  // or null
  ChannelValues weight, bias, running_mean, running_var;
  std::int64_t* num_batches_tracked;  // or null; incremented
  double momentum;
  bool cumulative_average;  // instead of momentum: 1 / num_batches_tracked
  double eps;
  Activation activation;
  double activation_param;
  double* mean;
  double* invstd;
  bool skip_nonfinite = false;  // a channel that is not finite leaves its running statistics alone

  BATCHNORM_HOST_DEVICE bool moves_running(double batch_mean, double batch_m2) const {
    return !skip_nonfinite || (batch_mean - batch_mean == 0 && batch_m2 - batch_m2 == 0);
  }
};

// y = act((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual).
struct ForwardEval {
  Problem problem;
  const void* x;
  const void* residual;  // or null
  void* y;
  ChannelValues weight, bias, running_mean, running_var;
  double eps;
  Activation activation;
  double activation_param;
  std::uint8_t* mask = nullptr;  // for a backward pass that has no x
};

// With z the activation's input and dz = dy * act'(z), over the n elements of a channel:
//   dbias = sum(dz), dweight = invstd * sum(dz * (x - mean)), dresidual = dz,
//   dx = weight * invstd * (dz - [dbias + (x - mean) * invstd * dweight] / n),
// the bracket only in training.
struct Backward {
  Problem problem;
  const void* dy;
  const void* x;
  const void* residual;      // or null; needed to recompute z where there is no mask
  const std::uint8_t* mask;  // or null
  ChannelValues weight, bias;
  const double* mean;
  const double* invstd;
  bool training;
  Activation activation;
  double activation_param;
  void* dx;                      // or null: not needed
  void* dresidual;               // or null
  ChannelValues dweight, dbias;  // data null: not needed

  BATCHNORM_HOST_DEVICE bool reduces() const {
    return dweight.data || dbias.data || (training && dx);
  }
};

}  // namespace batchnorm
