// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

#include "core/plan.h"

namespace batchnorm {
namespace bindings {

constexpr const char* kLayoutNames[] = {"channels_first", "channels_last"};
constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};
constexpr const char* kPassNames[] = {"forward", "backward", "eval"};

template <std::size_t kCount>
int index_of(const std::string& name, const char* const (&names)[kCount], const char* what) {
  std::string known;
  for (std::size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    known += std::string(i ? ", " : "") + names[i];
  }
  throw pybind11::value_error(std::string(what) + " should be one of " + known + ", but got '" +
                              name + "'");
}

// From the names that Python uses; ValueError for others, and where there is no element.
inline Problem problem_from(const std::string& layout, const std::string& dtype, std::int64_t n,
                            std::int64_t c, std::int64_t s) {
  if (n < 1 || c < 1 || s < 1) throw pybind11::value_error("n, c and s should be at least 1");
  return {static_cast<Layout>(index_of(layout, kLayoutNames, "layout")),
          static_cast<DType>(index_of(dtype, kDTypeNames, "dtype")), n, c, s};
}

inline Pass pass_from(const std::string& op) {
  return static_cast<Pass>(index_of(op, kPassNames, "op"));
}

}  // namespace bindings
}  // namespace batchnorm
