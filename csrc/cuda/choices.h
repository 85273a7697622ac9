// From what a plan says to what a kernel is compiled for.
#pragma once

#include "core/plan_cuda.h"

namespace batchnorm {
namespace cuda {

template <Mapping kMappingOf, Access kAccessOf, bool kSmoothOf>
struct Choice {
  static constexpr Mapping kMapping = kMappingOf;
  static constexpr Access kAccess = kAccessOf;
  static constexpr bool kSmooth = kSmoothOf;
};

// What pick(Choice<...>{}) returns for these values.
template <typename Kernel, typename Pick>
Kernel choose_kernel(Mapping mapping, Access access, bool smooth, const Pick& pick) {
  constexpr Mapping kPlanes = Mapping::kPlanes, kColumns = Mapping::kColumns;
  constexpr Access kVector = Access::kVector, kScalar = Access::kScalar;
  const Kernel table[2][2][2] = {
      {{pick(Choice<kPlanes, kVector, false>{}), pick(Choice<kPlanes, kVector, true>{})},
       {pick(Choice<kPlanes, kScalar, false>{}), pick(Choice<kPlanes, kScalar, true>{})}},
      {{pick(Choice<kColumns, kVector, false>{}), pick(Choice<kColumns, kVector, true>{})},
       {pick(Choice<kColumns, kScalar, false>{}), pick(Choice<kColumns, kScalar, true>{})}}};
  return table[static_cast<int>(mapping)][static_cast<int>(access)][smooth];
}

}  // namespace cuda
}  // namespace batchnorm
