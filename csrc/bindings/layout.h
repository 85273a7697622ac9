// Tensor -> the two memory layouts that the kernels know.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/checks.h"
#include "core/types.h"

namespace batchnorm {
namespace bindings {

inline std::vector<std::int64_t> channels_last_strides(at::IntArrayRef sizes) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t stride = 1;
  const auto visit = [&](std::size_t dim) {
    strides[dim] = stride;
    stride *= std::max<std::int64_t>(sizes[dim], 1);
  };
  visit(1);
  for (std::size_t dim = sizes.size() - 1; dim >= 2; --dim) visit(dim);
  visit(0);
  return strides;
}

inline std::int64_t spatial_size(const at::Tensor& tensor) {
  std::int64_t size = 1;
  for (std::int64_t dim = 2; dim < tensor.dim(); ++dim) size *= tensor.size(dim);
  return size;
}

// True where elements lie in memory as those of a contiguous (N, *, C) tensor.
inline bool is_channels_last(const at::Tensor& tensor) {
  const auto expected = channels_last_strides(tensor.sizes());
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) != expected[static_cast<std::size_t>(dim)]) {
      return false;
    }
  }
  return true;
}

// The tensor, or a copy, in this layout.
inline at::Tensor in_layout(const at::Tensor& tensor, Layout layout) {
  if (layout == Layout::kChannelsFirst) return tensor.contiguous();
  if (is_channels_last(tensor)) return tensor;
  const auto strides = channels_last_strides(tensor.sizes());
  return tensor.new_empty_strided(tensor.sizes(), strides).copy_(tensor);
}

// The tensor itself where its memory is one of the two layouts, else a copy in the nearest one.
inline at::Tensor in_some_layout(const at::Tensor& tensor) {
  if (tensor.is_contiguous() || is_channels_last(tensor)) return tensor;
  // Neighbouring channels in memory, as a slice or crop of a channels-last tensor has them.
  const bool channels_last = tensor.stride(1) == 1 && tensor.size(1) > 1;
  return in_layout(tensor, channels_last ? Layout::kChannelsLast : Layout::kChannelsFirst);
}

// The problem that a tensor from in_some_layout poses.
inline Problem problem_of(const at::Tensor& input) {
  const DType dtype = dtype_of(input, "input");
  const std::int64_t n = input.size(0), c = input.size(1), s = spatial_size(input);
  if (c == 1) return {Layout::kChannelsFirst, dtype, 1, 1, n * s};
  if (s == 1 || !input.is_contiguous()) return {Layout::kChannelsLast, dtype, n, c, s};
  return {Layout::kChannelsFirst, dtype, n, c, s};
}

inline ChannelValues channel_values(const OptionalTensor& values, const char* name) {
  if (!values.has_value() || !values->defined()) return {nullptr, DType::kFloat, 0};
  const std::int64_t stride = values->dim() == 1 ? values->stride(0) : 1;
  return {values->data_ptr(), dtype_of(*values, name), stride};
}

}  // namespace bindings
}  // namespace batchnorm
