// What the kernels are given to read and write, in memory that notices what they should not touch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <memory>

#include "core/types.h"
#include "device.h"

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
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    default:
      return __half2float(static_cast<const __half*>(data)[i]);
  }
}

inline void set(void* data, DType dtype, std::int64_t i, double value) {
  const float rounded = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat:
      static_cast<float*>(data)[i] = rounded;
      return;
    case DType::kDouble:
      static_cast<double*>(data)[i] = value;
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(rounded);
      return;
    default:
      static_cast<__half*>(data)[i] = __float2half_rn(rounded);
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
        memory_(std::make_unique<Memory>(all_)) {
    std::memset(memory_->host(), kUnwritten, all_);
  }

  unsigned char* host() const { return memory_->host() + begin_; }
  unsigned char* device() const { return memory_->device() + begin_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(bytes_); }
  void send() const { check::send(*memory_); }
  bool guards_are_intact() const {
    for (std::size_t i = 0; i < all_; ++i) {
      const bool is_guard = i < begin_ || i >= begin_ + bytes_;
      if (is_guard && memory_->host()[i] != kUnwritten) return false;
    }
    return true;
  }
  bool is_same_as(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(host(), other.host(), bytes_) == 0;
  }

 private:
  std::size_t bytes_, all_, begin_;
  std::unique_ptr<Memory> memory_;
};

// An integer that kernels count with.
class Counter {
 public:
  explicit Counter(std::int64_t value) : buffer_(sizeof(value)) {
    std::memcpy(buffer_.host(), &value, sizeof(value));
  }
  std::int64_t value() const {
    std::int64_t value;
    std::memcpy(&value, buffer_.host(), sizeof(value));
    return value;
  }
  std::int64_t* device() const { return reinterpret_cast<std::int64_t*>(buffer_.device()); }
  bool is_intact() const { return buffer_.guards_are_intact(); }

 private:
  Buffer buffer_;
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

  void* device() const { return buffer_.device(); }
  double* device_doubles() const { return static_cast<double*>(device()); }
  double operator[](std::int64_t i) const { return get(buffer_.host(), dtype_, i * stride_); }
  void put(std::int64_t i, double value) { set(buffer_.host(), dtype_, i * stride_, value); }
  std::int64_t count() const { return count_; }
  const Buffer& buffer() const { return buffer_; }
  ChannelValues values() const { return {device(), dtype_, stride_}; }

  void copy_from(const Tensor& other) {
    std::memcpy(buffer_.host(), other.buffer_.host(), static_cast<std::size_t>(buffer_.bytes()));
  }
  bool is_same_at(std::int64_t i, const Tensor& other) const {
    const auto size = static_cast<std::size_t>(size_of(dtype_));
    const std::size_t at = static_cast<std::size_t>(i * stride_) * size;
    return std::memcmp(buffer_.host() + at, other.buffer_.host() + at, size) == 0;
  }
  // Nothing around it was written, nor between its elements.
  bool is_intact() const {
    const std::int64_t size = size_of(dtype_);
    for (std::int64_t at = 0; stride_ > 1 && at < buffer_.bytes(); ++at) {
      if (at / size % stride_ != 0 && buffer_.host()[at] != kUnwritten) return false;
    }
    return buffer_.guards_are_intact();
  }

 private:
  DType dtype_;
  std::int64_t count_, stride_;
  Buffer buffer_;
};

}  // namespace check
