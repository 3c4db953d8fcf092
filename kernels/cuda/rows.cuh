// Rows in and out of fp32 by pieces: eight neighbours of a thread, or a group of 128 of a warp.
#ifndef CACHALOT_KERNELS_CUDA_ROWS_CUH_
#define CACHALOT_KERNELS_CUDA_ROWS_CUH_

#include "kernels/cuda/common.cuh"

namespace cachalot {

inline constexpr int kChunk = 8;         // values that a thread moves at once
inline constexpr int kScaleGroup = 128;  // values that share a scale
inline constexpr int kChunksPerGroup = kScaleGroup / kChunk;
inline constexpr uint32_t kFullWarp = 0xffffffffu;

// Whether a row's chunks can be moved by single loads and stores (16 bytes, of e4m3 eight).
inline bool MovesByChunks(const MatrixRef& m) {
  const int64_t element = m.type == NumberType::kF32 ? 4 : m.type == NumberType::kE4M3 ? 1 : 2;
  const int64_t piece = element == 1 ? 8 : 16;
  return reinterpret_cast<uintptr_t>(m.data) % piece == 0 && m.row_stride * element % piece == 0;
}
inline bool IsBf16OrAbsent(const MatrixRef& m) { return m.data == nullptr || m.type == NumberType::kBF16; }

__device__ __forceinline__ void UnpackBf16(const uint4& packed, float (&v)[kChunk]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint4 PackBf16(const float (&v)[kChunk]) {
  return make_uint4(PackBf16(v[0], v[1]), PackBf16(v[2], v[3]), PackBf16(v[4], v[5]), PackBf16(v[6], v[7]));
}

// Of a bf16 matrix.
__device__ __forceinline__ uint4* ChunkOf(const MatrixRef& m, int64_t t, int chunk) {
  return reinterpret_cast<uint4*>(static_cast<bf16*>(m.data) + t * m.row_stride) + chunk;
}

// To f32 or bf16.
__device__ __forceinline__ void StoreChunk(const MatrixRef& m, int64_t t, int chunk, const float (&v)[kChunk]) {
  if (m.type == NumberType::kF32) {
    float4* dst = reinterpret_cast<float4*>(static_cast<float*>(m.data) + t * m.row_stride) + 2 * chunk;
    dst[0] = make_float4(v[0], v[1], v[2], v[3]);
    dst[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    *ChunkOf(m, t, chunk) = PackBf16(v);
  }
}

// As FloatToE4m3, four at once.
__device__ __forceinline__ uint32_t PackE4m3(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// A chunk of row t. The whole warp must call; chunks of neighbouring lanes are neighbours, the first lane's chunk is a
// multiple of 16. Where `is_valid` is false there is no such chunk.
__device__ __forceinline__ void EmitChunk(const ActivationRef& out, int64_t t, int chunk, bool is_valid,
                                          const float (&v)[kChunk]) {
  if (out.values.type != NumberType::kE4M3) {
    if (is_valid) StoreChunk(out.values, t, chunk, v);
    return;
  }
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) amax = fmaxf(amax, fabsf(v[i]));
  if (!is_valid) amax = 0.0f;
#pragma unroll
  for (int offset = kChunksPerGroup / 2; offset > 0; offset /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, offset));
  }
  if (!is_valid) return;
  const float scale = QuantScale(amax, out.is_ue8m0);
  uint2 packed;
  packed.x = PackE4m3(v[0] / scale, v[1] / scale, v[2] / scale, v[3] / scale);
  packed.y = PackE4m3(v[4] / scale, v[5] / scale, v[6] / scale, v[7] / scale);
  reinterpret_cast<uint2*>(static_cast<uint8_t*>(out.values.data) + t * out.values.row_stride)[chunk] = packed;
  if (chunk % kChunksPerGroup == 0) out.scales[t * out.scale_stride + chunk / kChunksPerGroup] = scale;
}

inline constexpr int kLaneValues = kScaleGroup / kWarpSize;

// One group as e4m3 by a warp: v[i] is value 32 i + lane, zero from `count` on. Returns the scale.
__device__ __forceinline__ float QuantizeGroup(const float (&v)[kLaneValues], int count, bool is_ue8m0, uint8_t* out) {
  const int lane = threadIdx.x % kWarpSize;
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) amax = fmaxf(amax, fabsf(v[i]));
  const float scale = QuantScale(WarpMax(amax), is_ue8m0);
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int column = kWarpSize * i + lane;
    if (column < count) out[column] = FloatToE4m3(v[i] / scale);
  }
  return scale;
}

// One group of row t by a warp, values as QuantizeGroup's.
__device__ __forceinline__ void EmitGroup(const ActivationRef& out, int64_t t, int group, int cols,
                                          const float (&v)[kLaneValues]) {
  const int lane = threadIdx.x % kWarpSize, first = group * kScaleGroup, count = min(kScaleGroup, cols - first);
  if (out.values.type == NumberType::kE4M3) {
    uint8_t* values = static_cast<uint8_t*>(out.values.data) + t * out.values.row_stride + first;
    const float scale = QuantizeGroup(v, count, out.is_ue8m0, values);
    if (lane == 0) out.scales[t * out.scale_stride + group] = scale;
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int column = kWarpSize * i + lane;
    if (column < count) StoreNumber(out.values.data, t * out.values.row_stride + first + column, out.values.type, v[i]);
  }
}

// The sum over a block of whole warps, for every thread. `shared` has 32 values; used once between barriers.
__device__ __forceinline__ double BlockSum(double x, double* shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = WarpSum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return WarpSum(lane < static_cast<int>(blockDim.x) / kWarpSize ? shared[lane] : 0.0);
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_ROWS_CUH_
