// What kernels share: conversions, loads and stores by type, sums over warps and blocks.
#ifndef CACHALOT_KERNELS_CUDA_COMMON_CUH_
#define CACHALOT_KERNELS_CUDA_COMMON_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/device_tensor.h"

namespace cachalot {

using bf16 = __nv_bfloat16;

inline constexpr float kE4m3Max = 448.0f;
inline constexpr float kMinAmax = 1e-4f;
inline constexpr int kWarpSize = 32;

__device__ __forceinline__ float E4m3ToFloat(uint8_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
}
// Round to nearest even, saturating at +-448; NaN stays NaN.
__device__ __forceinline__ uint8_t FloatToE4m3(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

// The scale of a group of 128 whose largest magnitude is `amax` (tensor.h).
__device__ __forceinline__ float QuantScale(float amax, bool is_ue8m0) {
  const float scale = fmaxf(amax, kMinAmax) / kE4m3Max;
  if (!is_ue8m0) return scale;
  const uint32_t bits = __float_as_uint(scale);
  return __uint_as_float(((bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1 : 0)) << 23);
}

__device__ __forceinline__ float LoadNumber(const void* data, int64_t i, NumberType type) {
  switch (type) {
    case NumberType::kF32: return static_cast<const float*>(data)[i];
    case NumberType::kBF16: return __bfloat162float(static_cast<const bf16*>(data)[i]);
    case NumberType::kF16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return E4m3ToFloat(static_cast<const uint8_t*>(data)[i]);
  }
}

// f32 or bf16.
__device__ __forceinline__ void StoreNumber(void* data, int64_t i, NumberType type, float value) {
  if (type == NumberType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<bf16*>(data)[i] = __float2bfloat16(value);
  }
}

// 2^x by the special function unit: relative error 2^-22, results below 2^-126 are 0.
__device__ __forceinline__ float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// The sum over the lanes up to this one.
template <typename T>
__device__ __forceinline__ T WarpScan(T x) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, x, offset);
    if (static_cast<int>(threadIdx.x % kWarpSize) >= offset) x += other;
  }
  return x;
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_COMMON_CUH_
