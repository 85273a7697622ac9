// Mean and sum of squared deviations, and how two of them become one.
#pragma once

#include "core/types.h"

namespace batchnorm {

struct Moments {
  double mean = 0;
  double m2 = 0;  // sum of (x - mean)^2
  double count = 0;

  BATCHNORM_HOST_DEVICE double variance() const { return count > 0 ? m2 / count : 0; }
};

// Chan, Golub & LeVeque (1979): exact in exact arithmetic, without cancellation.
BATCHNORM_HOST_DEVICE inline Moments combine(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count;
  const double delta = b.mean - a.mean;
  const double share = b.count / count;
  return {a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share), count};
}

}  // namespace batchnorm
