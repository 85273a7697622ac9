// Per-channel values of the 16-bit dtypes, one at a time.
#include <cmath>
#include <cstring>

#include "cpu/units.h"

namespace batchnorm {
namespace cpu {
namespace {

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

double widen(BFloat16 value) { return from_bits(std::uint32_t{value.bits} << 16); }

double widen(Half value) {
  const int exponent = (value.bits >> 10) & 0x1f, fraction = value.bits & 0x3ff;
  const double sign = value.bits & 0x8000 ? -1 : 1;
  if (exponent == 0x1f) return fraction ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

void narrow(double wide, BFloat16* to) {
  const std::uint32_t bits = to_bits(static_cast<float>(wide));
  if (wide != wide) {
    to->bits = 0x7fc0;
  } else {
    to->bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

void narrow(double wide, Half* to) {
  const std::uint16_t sign = std::signbit(wide) ? 0x8000 : 0;
  const double magnitude = std::fabs(wide);
  if (wide != wide) {
    to->bits = 0x7e00;
  } else if (magnitude >= 65520) {
    to->bits = sign | 0x7c00;
  } else if (magnitude < 0x1p-14) {
    // A rounding up to 1024 is the smallest normal number's bits.
    to->bits =
        static_cast<std::uint16_t>(sign | static_cast<int>(std::nearbyint(magnitude * 0x1p24)));
  } else {
    int exponent;
    const double fraction = std::frexp(magnitude, &exponent);               // in [0.5, 1)
    const int rounded = static_cast<int>(std::nearbyint(fraction * 2048));  // 1024 to 2048
    to->bits = static_cast<std::uint16_t>(sign + (((exponent + 14) << 10) + rounded - 1024));
  }
}

template <typename V>
V* entry(const ChannelValues& values, std::int64_t channel) {
  return static_cast<V*>(values.data) + channel * values.stride;
}

}  // namespace

double load_half_precision(const ChannelValues& values, std::int64_t channel) {
  if (values.dtype == DType::kBFloat16) return widen(*entry<BFloat16>(values, channel));
  return widen(*entry<Half>(values, channel));
}

void store_half_precision(const ChannelValues& values, std::int64_t channel, double value) {
  if (values.dtype == DType::kBFloat16) {
    narrow(value, entry<BFloat16>(values, channel));
  } else {
    narrow(value, entry<Half>(values, channel));
  }
}

}  // namespace cpu
}  // namespace batchnorm
