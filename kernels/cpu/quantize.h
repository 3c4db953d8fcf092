// Scalar conversions between fp32 and e4m3, and the scale rules of FP8 groups.
#ifndef CACHALOT_KERNELS_CPU_QUANTIZE_H_
#define CACHALOT_KERNELS_CPU_QUANTIZE_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/half_float.h"
#include "kernels/tensor.h"

namespace cachalot {

inline constexpr float kE4m3Max = 448.0f;
inline constexpr float kMinAmax = 1e-4f;  // a group of zeros still has a finite scale

inline float E4m3ToFloat(uint8_t byte) {
  const int exponent = (byte >> 3) & 15, mantissa = byte & 7;
  if ((byte & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = std::ldexp(static_cast<float>(mantissa + (exponent > 0 ? 8 : 0)), std::max(exponent, 1) - 10);
  return (byte & 0x80) != 0 ? -magnitude : magnitude;
}

// Round to nearest even, saturating at +-448; NaN stays NaN.
inline uint8_t FloatToE4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80);
  if (std::isnan(value)) return sign | 0x7f;
  const float magnitude = std::min(std::fabs(value), kE4m3Max);
  if (magnitude < 0x1p-6f) {
    // NOTE: adding 2^14 leaves a multiple of 2^-9, rounded to even by the adder, in the low bits.
    return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(magnitude + 0x1p14f) & 0xf);
  }
  const uint32_t m = std::bit_cast<uint32_t>(magnitude);
  return sign | static_cast<uint8_t>(((m + 0x7ffff + ((m >> 20) & 1)) >> 20) - (120 << 3));
}

// The scale of a group whose largest magnitude is `amax` (see tensor.h).
inline float QuantScale(float amax, ScaleRule rule) {
  const float scale = std::max(amax, kMinAmax) / kE4m3Max;
  if (rule == ScaleRule::kFP32) return scale;
  // 2^ceil(log2(scale)): the exponent, one up unless the mantissa is zero.
  const uint32_t bits = std::bit_cast<uint32_t>(scale);
  return std::bit_cast<float>(((bits >> 23) + ((bits & 0x7fffff) != 0 ? 1 : 0)) << 23);
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_QUANTIZE_H_
