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

// Columns of equal count that belong to one channel. The mean is taken as a shift from the first
// one's, so that equal means stay exactly equal.
inline Moments combine_equal(const double* mean, const double* m2, long long columns,
                             long long stride, double count_each) {
  if (columns == 1) return {mean[0], m2[0], count_each};
  double shift = 0;
  for (long long j = 0; j < columns; ++j) shift += mean[j * stride] - mean[0];
  Moments all;
  all.mean = mean[0] + shift / static_cast<double>(columns);
  double between = 0;
  for (long long j = 0; j < columns; ++j) {
    const double delta = mean[j * stride] - all.mean;
    between += delta * delta;
    all.m2 += m2[j * stride];
  }
  all.m2 += between * count_each;
  all.count = static_cast<double>(columns) * count_each;
  return all;
}

}  // namespace batchnorm
