// Tensor -> the two memory layouts that the kernels know.
#pragma once

#include <ATen/core/Tensor.h>

#include "bindings/checks.h"
#include "core/types.h"

namespace batchnorm {
namespace bindings {

// True where elements lie in memory as those of a contiguous (N, *, C) tensor.
bool is_channels_last(const at::Tensor& tensor);

// The tensor itself where its memory is one of the two layouts, else a copy in the nearest one.
at::Tensor in_some_layout(const at::Tensor& tensor);

// The tensor, or a copy, in this layout.
at::Tensor in_layout(const at::Tensor& tensor, Layout layout);

// The problem that a tensor from in_some_layout poses.
Problem problem_of(const at::Tensor& input);

ChannelValues channel_values(const OptionalTensor& values, const char* name);

}  // namespace bindings
}  // namespace batchnorm
