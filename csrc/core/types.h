// What a batch-norm call is, in plain terms: dtypes, memory layout and sizes.
#pragma once

#include <cstdint>

// Of what kernels call too.
#ifdef __CUDACC__
#define BATCHNORM_HOST_DEVICE __host__ __device__
#else
#define BATCHNORM_HOST_DEVICE
#endif

namespace batchnorm {

enum class DType : std::uint8_t { kFloat, kDouble, kBFloat16, kHalf };

// Storage of the 16-bit types; the kernels convert in registers.
struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// The type in which a stored value is computed with.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

// kChannelsFirst: [n, c, s], s contiguous.  kChannelsLast: [n * s, c], c contiguous.
enum class Layout : std::uint8_t { kChannelsFirst, kChannelsLast };

struct Problem {
  Layout layout;
  DType dtype;
  std::int64_t n, c, s;  // batch, channels, product of the spatial sizes

  BATCHNORM_HOST_DEVICE std::int64_t per_channel() const { return n * s; }
  std::int64_t numel() const { return n * c * s; }
};

BATCHNORM_HOST_DEVICE inline int size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat:
      return 4;
    case DType::kDouble:
      return 8;
    default:
      return 2;
  }
}

// What body(T{}) returns, T being the storage type that dtype names.
template <typename Body>
auto with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat:
      return body(float{});
    case DType::kDouble:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

// The 1-bit mask is a matrix of rows padded to whole bytes, so that no two threads share a byte:
// a row is a plane (channels-first) or a row of channels (channels-last). Where planes are reduced
// as columns (core/plan.h), an image's bits lie in its rows without the padding, and groups of 8
// channels own whole bytes. On the CPU, where several short rows of channels are folded into one,
// theirs lie without padding, too.
inline std::int64_t mask_rows(const Problem& p) {
  return p.layout == Layout::kChannelsFirst ? p.n * p.c : p.n * p.s;
}
inline std::int64_t mask_row_bytes(const Problem& p) {
  return ((p.layout == Layout::kChannelsFirst ? p.s : p.c) + 7) / 8;
}

// Per-channel values (weight, bias, running statistics) keep their own dtype and stride.
struct ChannelValues {
  void* data;  // [c], or null where the caller gave none
  DType dtype;
  std::int64_t stride;  // in elements
};

}  // namespace batchnorm
