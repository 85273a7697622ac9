// What a backend is asked to do: raw pointers into the backend's memory, no torch.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/moments.h"
#include "core/types.h"

namespace batchnorm {

// x, residual, y, dy, dx, dresidual: problem.numel() elements of problem.dtype in problem.layout.
// mean, invstd: double [c]. mask: mask_rows() x mask_row_bytes() of core/types.h.

// What a batch does to the running statistics:
// running = (1 - momentum) * running + momentum * batch (the variance unbiased, n / (n - 1), and
// left as it is by a batch of one value, which has no such variance).
struct RunningStatistics {
  ChannelValues mean, var;
  std::int64_t* num_batches_tracked;  // or null; incremented
  double momentum;
  bool cumulative_average;      // instead of momentum: 1 / num_batches_tracked
  bool skip_nonfinite = false;  // a channel that is not finite leaves its values alone

  BATCHNORM_HOST_DEVICE bool are_moved_by(const Moments& batch) const {
    const bool finite = batch.mean - batch.mean == 0 && batch.m2 - batch.m2 == 0;
    return batch.count > 0 && (!skip_nonfinite || finite);
  }
};

// Statistics of the batch, and y = act((x - mean) * invstd * weight + bias + residual), or the
// statistics alone.
struct ForwardTrain {
  Problem problem;
  const void* x;
  const void* residual;  // or null
  void* y;               // or null
  std::uint8_t* mask;    // or null
  ChannelValues weight, bias;
  RunningStatistics running;
  double eps;
  Activation activation;
  double activation_param;
  double* mean;
  double* invstd;  // or null
  double* m2;      // or null; sum((x - mean)^2)
};

// Moments of the same channels from several ranks -> those of all, by combine() of core/moments.h
// in the order of ranks.
struct CombineMoments {
  std::int64_t ranks, c;
  // [ranks][2 c + 1]: mean, sum of squared deviations and, once, the count of a channel's elements.
  const double* parts;
  RunningStatistics running;
  double eps;
  double* mean;
  double* var;  // biased
  double* invstd;
  double* count;  // one value

  BATCHNORM_HOST_DEVICE Moments of_channel(std::int64_t channel) const {
    Moments all;
    for (std::int64_t rank = 0; rank < ranks; ++rank) {
      const double* const part = parts + rank * (2 * c + 1);
      all = combine(all, {part[channel], part[c + channel], part[2 * c]});
    }
    return all;
  }
  BATCHNORM_HOST_DEVICE double count_of_all() const {
    double count = 0;
    for (std::int64_t rank = 0; rank < ranks; ++rank) count += parts[rank * (2 * c + 1) + 2 * c];
    return count;
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
// the bracket only in training, and by the sums over all ranks where these are given.
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
  // Or null: [2 c + 1], dweight and dbias of all ranks, and n. Then dx and dresidual alone.
  const double* totals = nullptr;

  BATCHNORM_HOST_DEVICE bool reduces() const {
    return !totals && (dweight.data || dbias.data || (training && dx));
  }
};

}  // namespace batchnorm
