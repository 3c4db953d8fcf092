// 2^x and e^x in single precision, the same bits on the CPU and on every GPU: what an expert's choice or a rounding
// hangs on must not depend on whose exp it was. Only fused multiply-adds and exact steps, in one order: x = n + r (Cody
// and Waite), 2^r by a polynomial of degree 5 that is 1 at 0, times 2^n. Relative error of Exp2: 1.6e-7, of
// Exp: 2.2e-7. Results below 2^-126 are rough, then 0; NaN stays NaN.
#ifndef CACHALOT_KERNELS_EXPONENTIAL_H_
#define CACHALOT_KERNELS_EXPONENTIAL_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define CACHALOT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CACHALOT_HOST_DEVICE inline
#endif

namespace cachalot {

// NOTE: for r in [-0.5, 0.5]; fitted so that the largest relative error is least: 9.5e-8.
inline constexpr float kExp2C1 = 0x1.62e42ap-1f, kExp2C2 = 0x1.ebf9bep-3f, kExp2C3 = 0x1.c6b70cp-5f,
                       kExp2C4 = 0x1.3cea7ep-7f, kExp2C5 = 0x1.5bb9a6p-10f;
// Adding it leaves the nearest integer in a float's last bits: 1.5 * 2^23.
inline constexpr float kToInteger = 0x1.8p23f;
inline constexpr float kLog2E = 0x1.715476p0f, kLog2ERest = 0x1.4ae0cp-26f;  // together log2(e)
inline constexpr float kLeastExp2 = -127.0f, kLeastExp = -86.5f, kMostExp = 88.0f;

// 2^r * 2^n, n being kToInteger less than `shifted`.
CACHALOT_HOST_DEVICE float Exp2Parts(float r, float shifted) {
  float p = std::fma(kExp2C5, r, kExp2C4);
  p = std::fma(p, r, kExp2C3);
  p = std::fma(p, r, kExp2C2);
  p = std::fma(p, r, kExp2C1);
  p = std::fma(p, r, 1.0f);
#ifdef __CUDA_ARCH__
  return p * __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
#else
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
#endif
}

// x: at most 127. NOTE: 2^-127, the least there is, has no exponent left and is 0.
CACHALOT_HOST_DEVICE float Exp2(float x) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(kLeastExp2));
#else
  x = x < kLeastExp2 ? kLeastExp2 : x;
#endif
  const float shifted = x + kToInteger;
  return Exp2Parts(x - (shifted - kToInteger), shifted);
}

// Any x; infinite from 88 on.
CACHALOT_HOST_DEVICE float Exp(float x) {
  const float shifted = std::fma(x, kLog2E, kToInteger);
  const float r = std::fma(x, kLog2ERest, std::fma(x, kLog2E, kToInteger - shifted));
  const float result = Exp2Parts(r, shifted);
  return x < kLeastExp ? 0.0f : x > kMostExp ? std::numeric_limits<float>::infinity() : result;
}

// What 2^x of attention's scores is relative to: the largest so far, or less, by no more than a factor of 2^8. So what
// was added before seldom has to be scaled anew.
CACHALOT_HOST_DEVICE float GrownMax(float before, float largest) { return largest - before > 8.0f ? largest : before; }

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_EXPONENTIAL_H_
