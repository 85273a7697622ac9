// What the kernels are given to read and write, in memory that notices what they should not touch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/types.h"
#include "cuda/cell.cuh"

namespace check {

using namespace batchnorm;

constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};

inline double get(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kFloat:
      return static_cast<const float*>(data)[i];
    case DType::kDouble:
      return static_cast<const double*>(data)[i];
    case DType::kBFloat16:
      return cuda::widen(static_cast<const BFloat16*>(data)[i]);
    default:
      return cuda::widen(static_cast<const Half*>(data)[i]);
  }
}

inline void set(void* data, DType dtype, std::int64_t i, double value) {
  const float rounded = static_cast<float>(value);
  BFloat16 bf16[2];
  Half half[2];
  switch (dtype) {
    case DType::kFloat:
      static_cast<float*>(data)[i] = rounded;
      return;
    case DType::kDouble:
      static_cast<double*>(data)[i] = value;
      return;
    case DType::kBFloat16:
      cuda::narrow(rounded, rounded, bf16);
      static_cast<BFloat16*>(data)[i] = bf16[0];
      return;
    default:
      cuda::narrow(rounded, rounded, half);
      static_cast<Half*>(data)[i] = half[0];
  }
}

// Relative distance of neighbouring values, and of those that are computed with.
inline double unit(DType dtype) {
  constexpr double kUnits[] = {0x1p-23, 0x1p-52, 0x1p-7, 0x1p-10};
  return kUnits[static_cast<int>(dtype)];
}
// What is lost at least near 0, where float16 has no more digits.
inline double smallest(DType dtype) { return dtype == DType::kHalf ? 0x1p-25 : 0x1p-133; }
// How far the stored value may be off, with some room.
inline double rounding(DType dtype, double value) {
  return unit(dtype) * (value < 0 ? -value : value) + smallest(dtype);
}
inline double compute_unit(DType dtype) { return dtype == DType::kDouble ? 0x1p-52 : 0x1p-23; }

// AddressSanitizer sees the bytes around an allocation itself; elsewhere guards lie there.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kGuard = 0;
#else
constexpr std::size_t kGuard = 64;
#endif
constexpr unsigned char kUnwritten = 0xff;  // nan in every dtype

// `shift` bytes off a 16-byte aligned address. All of it, guards included, begins unwritten.
class Buffer {
 public:
  explicit Buffer(std::int64_t bytes, int shift = 0)
      : bytes_(static_cast<std::size_t>(bytes)),
        all_(2 * kGuard + static_cast<std::size_t>(shift) + bytes_),
        begin_(kGuard + static_cast<std::size_t>(shift)),
        memory_(static_cast<unsigned char*>(std::malloc(all_ > 0 ? all_ : 1))) {
    std::memset(memory_.get(), kUnwritten, all_);
  }

  unsigned char* data() const { return memory_.get() + begin_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(bytes_); }
  bool guards_are_intact() const {
    for (std::size_t i = 0; i < all_; ++i) {
      const bool is_guard = i < begin_ || i >= begin_ + bytes_;
      if (is_guard && memory_.get()[i] != kUnwritten) return false;
    }
    return true;
  }
  bool is_same_as(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::size_t bytes_, all_, begin_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// Elements of a dtype, `stride` apart; `shift` elements off an aligned address.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t count, int shift = 0, std::int64_t stride = 1)
      : dtype_(dtype),
        count_(count),
        stride_(stride),
        buffer_((count > 0 ? (count - 1) * stride + 1 : 0) * size_of(dtype),
                shift * size_of(dtype)) {}

  void* data() const { return buffer_.data(); }
  double operator[](std::int64_t i) const { return get(data(), dtype_, i * stride_); }
  void put(std::int64_t i, double value) { set(data(), dtype_, i * stride_, value); }
  std::int64_t count() const { return count_; }
  const Buffer& buffer() const { return buffer_; }
  ChannelValues values() const { return {data(), dtype_, stride_}; }

  void copy_from(const Tensor& other) {
    std::memcpy(data(), other.data(), static_cast<std::size_t>(buffer_.bytes()));
  }
  bool is_same_at(std::int64_t i, const Tensor& other) const {
    const auto size = static_cast<std::size_t>(size_of(dtype_));
    const std::size_t at = static_cast<std::size_t>(i * stride_) * size;
    return std::memcmp(buffer_.data() + at, other.buffer_.data() + at, size) == 0;
  }
  // Nothing around it was written, nor between its elements.
  bool is_intact() const {
    const std::int64_t size = size_of(dtype_);
    for (std::int64_t at = 0; stride_ > 1 && at < buffer_.bytes(); ++at) {
      if (at / size % stride_ != 0 && buffer_.data()[at] != kUnwritten) return false;
    }
    return buffer_.guards_are_intact();
  }

 private:
  DType dtype_;
  std::int64_t count_, stride_;
  Buffer buffer_;
};

}  // namespace check
